"""Whatever happens while a checkpoint is written, its file is the old one or the new one, whole."""

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
from project.runtime.atomic_write import TEMPORARY
from tests.conftest import STORED
from tests.faults import run_until

OLD, NEW = 1.0, 2.0


def checkpoint(value: float) -> dict[str, Any]:
    return {"state_dict": {"head.weight": torch.full((200, 50), value)}, "epoch": int(value)}


def held(path: Path) -> float:
    """What a checkpoint holds; it is loaded whole."""
    found = torch.load(path, weights_only=True)
    values = found["state_dict"]["head.weight"].unique().tolist()
    assert values == [found["epoch"]]
    return float(found["epoch"])


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's file, with the folder of temporary files on another file system."""
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and os.access(elsewhere, os.W_OK):
        assert elsewhere.stat().st_dev != tmp_path.stat().st_dev
        monkeypatch.setenv("TMPDIR", str(elsewhere))
    return tmp_path / "checkpoints" / "last.ckpt"


def save(path: Path, value: float) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint(value), path)


def test_killed_at_any_system_call_of_a_save_the_old_or_the_new_one_is_there(path: Path) -> None:
    left = []
    for number in itertools.count():
        save(path, OLD)
        if run_until(lambda: save(path, NEW), number) is None:
            break
        left.append(held(path))
    assert len(left) > 10, "there is more than one call to be killed at"
    assert left == sorted(left), "from some call on, it is the new one"
    assert {*left} == {OLD, NEW}


def test_where_the_disk_is_full_at_any_system_call_it_is_said_and_a_whole_one_is_there(path: Path) -> None:
    codes = []
    for number in itertools.count():
        save(path, OLD)
        code = run_until(lambda: save(path, NEW), number, errno.ENOSPC)
        if code is None:
            break
        codes.append(code)
        assert held(path) in (OLD, NEW) if code else held(path) == NEW
        assert not [each for each in path.parent.iterdir() if each.name.startswith(TEMPORARY)]
    assert len(codes) > 4 and 1 in codes


def test_the_first_of_all_either_is_there_or_not(path: Path) -> None:
    for number in itertools.count():
        path.unlink(missing_ok=True)
        if run_until(lambda: save(path, NEW), number) is None:
            break
        assert not path.exists() or held(path) == NEW


def test_what_cannot_be_written_is_told_with_the_systems_reason(path: Path, mount: Callable[..., None]) -> None:
    path.parent.mkdir()
    mount("-t", "tmpfs", "-o", "size=100k", "none", str(path.parent))
    save(path, OLD)
    (path.parent / "others").write_bytes(bytes(40_000))
    with pytest.raises(CheckpointError) as caught:
        save(path, NEW)
    assert f"{path} cannot be written: No space left on device. What it held before is whole." in str(caught.value)
    assert held(path) == OLD


def test_a_folder_that_cannot_be_written_is_told(path: Path, mount: Callable[..., None]) -> None:
    save(path, OLD)
    mount("--bind", str(path.parent), str(path.parent))
    mount("-o", "remount,ro,bind", str(path.parent))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        save(path, NEW)
    assert held(path) == OLD


def test_a_fit_whose_disk_fills_up_ends_and_keeps_the_last_epoch_that_was_saved(
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

    def fills_up(self: AtomicCheckpointIO, content: dict[str, Any], path: str, storage_options: Any = None) -> None:
        if Path(path).name == "last.ckpt" and next(saves) == 2:
            with pytest.raises(OSError, match="No space left"):
                Path("runs/others").write_bytes(bytes(3 * 2**20))
        original(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fills_up)
    said = refused(fit(*STORED, "--trainer.max_epochs", "5"))
    assert "last.ckpt cannot be written: No space left on device." in said
    last = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 2
