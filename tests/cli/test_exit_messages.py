"""Whatever ends a command ends it in a line or two, and with an exit code that says whose mistake it was."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project.cli import main as entry
from project.cli.exit_messages import describe
from project.cli.main import main
from project.errors import DataError

SHARED = [
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",
    "unable to write to file </torch_7_1_0>: No space left on device (28)",
    "unable to mmap 640 bytes from file </torch_7_1_0>: Cannot allocate memory (12)",
    "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
]
#: What was raised, words of the message, and the exit code.
ENDS: dict[str, tuple[Exception, str, int]] = {
    "a mistake": (DataError("a.jpg is empty."), "error: a.jpg is empty.", 2),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), "What was saved before is whole", 2),
    "no memory": (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: Not enough memory", 2),
    "no memory in Python": (MemoryError(), "error: Not enough memory", 2),
    "no GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "--data.batch_size", 2),
    **{f"no shared memory {n}": (RuntimeError(text), "--data.num_workers 0", 2) for n, text in enumerate(SHARED)},
    "an error of ours": (KeyError("rows"), "internal error: KeyError: 'rows'", 70),
    "a runtime error": (RuntimeError("mat1 and mat2 shapes"), "internal error: RuntimeError: mat1 and mat2 shapes", 70),
}


@pytest.mark.parametrize("name", ENDS)
def test_each_end_has_its_message_and_its_code(name: str) -> None:
    error, words, code = ENDS[name]
    message, found = describe(error, ["fit"])
    assert found == code
    assert words in message and len(message.splitlines()) <= 2


def test_containers_are_told_how_to_get_shared_memory() -> None:
    assert "docker run --shm-size" in describe(RuntimeError(SHARED[0]), [])[0]


def _raise(*_: Any) -> None:
    raise KeyError("rows")


def test_an_error_of_ours_leaves_a_file_to_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "TransferCLI", _raise)
    assert main(["fit", "--data.root", "x"]) == 70
    said = capsys.readouterr().err
    assert "Traceback" not in said
    path = Path(said.splitlines()[1].rpartition(": ")[2])
    text = path.read_text()
    assert "python -m project fit --data.root x" in text and f"torch {torch.__version__.partition('+')[0]}" in text
    assert "Traceback" in text and "KeyError: 'rows'" in text and "_raise" in text
    with pytest.raises(KeyError):
        main(["fit", "--debug"])


def test_where_no_file_can_be_written_the_traceback_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KeyError):
        describe(KeyError("rows"), [])


def test_a_flag_that_lightning_refuses_is_a_mistake(fit: Callable[..., int], refused: Callable[[int], str]) -> None:
    assert "val_check_interval" in refused(fit("--trainer.val_check_interval", "100"))


def test_a_pipe_that_nobody_reads_ends_quietly(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["check", "--data.root", str(photos)]) == 141
    assert not capsys.readouterr().err


def test_so_does_a_mistake_whose_message_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        assert main(["fit", "--data.rot", "x"]) == 141
