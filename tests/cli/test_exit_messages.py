"""Error messages and exit codes of the command line."""

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

SHARED_MEMORY_ERRORS = [
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",
    "unable to write to file </torch_7_1_0>: No space left on device (28)",
    "unable to mmap 640 bytes from file </torch_7_1_0>: Cannot allocate memory (12)",
    "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
]
#: Exception, part of the message, and exit code.
ERRORS: dict[str, tuple[Exception, str, int]] = {
    "user error": (DataError("a.jpg is empty."), "error: a.jpg is empty.", 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), "already saved are intact", 2),
    "folder of somebody else": (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: Permission", 2),
    "file in place of a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "error: a/b: Not a", 2),
    "ENOMEM": (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: Not enough memory", 2),
    "MemoryError": (MemoryError(), "error: Not enough memory", 2),
    "out of GPU memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "--data.batch_size",
        2,
    ),
    **{
        f"out of shared memory {n}": (RuntimeError(text), "--data.num_workers 0", 2)
        for n, text in enumerate(SHARED_MEMORY_ERRORS)
    },
    "internal error": (KeyError("rows"), "internal error: KeyError: 'rows'", 70),
    "runtime error": (RuntimeError("mat1 and mat2 shapes"), "internal error: RuntimeError: mat1 and mat2 shapes", 70),
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_has_its_message_and_exit_code(name: str) -> None:
    error, text, expected_code = ERRORS[name]
    message, code = describe(error, ["fit"])
    assert code == expected_code
    assert text in message and len(message.splitlines()) <= 2


def test_shared_memory_error_names_the_docker_flag() -> None:
    assert "docker run --shm-size" in describe(RuntimeError(SHARED_MEMORY_ERRORS[0]), [])[0]


def _raise(*_: Any) -> None:
    raise KeyError("rows")


def test_internal_error_writes_a_report_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "TransferCLI", _raise)
    assert main(["fit", "--data.root", "x"]) == 70
    message = capsys.readouterr().err
    assert "Traceback" not in message
    path = Path(message.splitlines()[1].rpartition(": ")[2])
    text = path.read_text()
    assert "python -m project fit --data.root x" in text and f"torch {torch.__version__.partition('+')[0]}" in text
    assert "Traceback" in text and "KeyError: 'rows'" in text and "_raise" in text
    with pytest.raises(KeyError):
        main(["fit", "--debug"])


def test_internal_error_is_raised_if_no_report_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(KeyError):
        describe(KeyError("rows"), [])


def test_flag_that_lightning_rejects_is_a_user_error(fit: Callable[..., int], refused: Callable[[int], str]) -> None:
    assert "val_check_interval" in refused(fit("--trainer.val_check_interval", "100"))


def test_closed_output_pipe_exits_with_141_and_no_message(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", buffering=1) as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        assert main(["check", "--data.root", str(photos)]) == 141
    assert not capsys.readouterr().err


def test_closed_error_pipe_exits_with_141(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", buffering=1) as closed_pipe:
        monkeypatch.setattr(sys, "stderr", closed_pipe)
        assert main(["fit", "--data.rot", "x"]) == 141
