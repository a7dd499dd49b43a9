"""A checkpoint file is always the complete old or the complete new one, whatever interrupts a save."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project.checkpoints.io import AtomicCheckpointIO
from project.errors import CheckpointError
from project.runtime.atomic_write import TEMPORARY_PREFIX
from tests.conftest import STORED
from tests.faults import run_until_syscall

OLD, NEW = 1.0, 2.0


def checkpoint(value: float) -> dict[str, Any]:
    return {"state_dict": {"head.weight": torch.full((200, 50), value)}, "epoch": int(value)}


def load_value(path: Path) -> float:
    """Load a checkpoint completely and return its value, OLD or NEW."""
    loaded = torch.load(path, weights_only=True)
    values = loaded["state_dict"]["head.weight"].unique().tolist()
    assert values == [loaded["epoch"]]
    return float(loaded["epoch"])


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a checkpoint, with ``$TMPDIR`` on another file system."""
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir() and os.access(shared_memory, os.W_OK):
        assert shared_memory.stat().st_dev != tmp_path.stat().st_dev
        monkeypatch.setenv("TMPDIR", str(shared_memory))
    return tmp_path / "checkpoints" / "last.ckpt"


def save(path: Path, value: float) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(value), path)


def test_kill_at_any_system_call_leaves_the_old_or_the_new_checkpoint(path: Path) -> None:
    values = []
    for number in itertools.count():
        save(path, OLD)
        if run_until_syscall(lambda: save(path, NEW), number) is None:
            break
        values.append(load_value(path))
    assert len(values) > 10, "a save makes several system calls"
    assert values == sorted(values), "the file changes from old to new once"
    assert {*values} == {OLD, NEW}


def test_full_disk_at_any_system_call_leaves_a_complete_checkpoint_and_no_temporary_file(path: Path) -> None:
    codes = []
    for number in itertools.count():
        save(path, OLD)
        code = run_until_syscall(lambda: save(path, NEW), number, errno.ENOSPC)
        if code is None:
            break
        codes.append(code)
        assert load_value(path) in (OLD, NEW) if code else load_value(path) == NEW
        assert not [file for file in path.parent.iterdir() if file.name.startswith(TEMPORARY_PREFIX)]
    assert len(codes) > 4 and 1 in codes


def test_kill_during_the_first_save_leaves_no_partial_checkpoint(path: Path) -> None:
    for number in itertools.count():
        path.unlink(missing_ok=True)
        if run_until_syscall(lambda: save(path, NEW), number) is None:
            break
        assert not path.exists() or load_value(path) == NEW


def test_full_disk_is_reported_with_the_systems_message(path: Path, mount: Callable[..., None]) -> None:
    path.parent.mkdir()
    mount("-t", "tmpfs", "-o", "size=100k", "none", str(path.parent))
    save(path, OLD)
    (path.parent / "others").write_bytes(bytes(40_000))
    with pytest.raises(CheckpointError) as caught:
        save(path, NEW)
    assert f"{path} cannot be written: No space left on device. The previous file is intact." in str(caught.value)
    assert load_value(path) == OLD


def test_read_only_folder_is_reported(path: Path, mount: Callable[..., None]) -> None:
    save(path, OLD)
    mount("--bind", str(path.parent), str(path.parent))
    mount("-o", "remount,ro,bind", str(path.parent))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save(path, NEW)
    assert load_value(path) == OLD


def test_fit_on_a_disk_that_fills_up_keeps_the_last_saved_epoch(
    fit: Callable[..., int],
    here: Path,
    mount: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[int], str],
) -> None:
    (here / "runs").mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "none", str(here / "runs"))
    saves = itertools.count()
    original = AtomicCheckpointIO.save_checkpoint

    def fill_disk(self: AtomicCheckpointIO, content: dict[str, Any], path: str, storage_options: Any = None) -> None:
        if Path(path).name == "last.ckpt" and next(saves) == 2:
            with pytest.raises(OSError, match="No space left"):
                Path("runs/others").write_bytes(bytes(3 * 2**20))
        original(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fill_disk)
    message = refused(fit(*STORED, "--trainer.max_epochs", "5"))
    assert "last.ckpt cannot be written: No space left on device." in message
    last = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2
