"""Rank, world size and launcher of a process."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch.utilities import rank_zero_only

from project.errors import ProjectError
from project.runtime.distributed import (
    ProcessGroup,
    environment_rank,
    is_externally_launched,
    is_first_process,
    is_rank_zero,
    launcher_pid,
    world_size,
)


@pytest.fixture(autouse=True)
def _no_distributed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_single_process_has_rank_zero_and_world_size_one() -> None:
    assert is_rank_zero() and is_first_process() and not is_externally_launched()
    assert launcher_pid() is None
    assert environment_rank() == (0, 1)
    assert (world_size(), ProcessGroup().rank, ProcessGroup().size) == (1, 0, 1)


def test_rank_of_lightning_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not is_rank_zero() and not is_first_process()


def test_process_of_another_node_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_rank_zero() and not is_first_process()


def test_environment_tells_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launcher_pid() == os.getppid(), "Lightning's first process on this machine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert is_externally_launched() and launcher_pid() is None
    assert environment_rank() == (5, 8)


class _ThreadOfTwo(ProcessGroup):
    """A rank of two, each a thread of this process."""

    values: ClassVar[list[Any]] = [None, None]
    barrier = threading.Barrier(2, timeout=10)

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait()
        gathered = [*self.values]
        self.barrier.wait()
        return gathered


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_of_the_same_name_on_another_machine_is_not_shared(is_shared: bool, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / ("a" if is_shared else "b")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(lambda rank: _ThreadOfTwo(rank).shares(folders[rank]), range(2))] == [True, is_shared]
    assert not [*tmp_path.glob("*/*")]


def test_no_rank_waits_if_the_folder_is_closed_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def closed(path: Path) -> bool:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return exists(path)

    monkeypatch.setattr(Path, "exists", closed)
    with ThreadPoolExecutor(2) as threads:
        folders = [tmp_path, tmp_path / "closed"]
        first, second = (threads.submit(_ThreadOfTwo(rank).shares, folders[rank]) for rank in range(2))
    assert isinstance(first.exception(), ProjectError) and "Rank 1 failed: PermissionError" in str(first.exception())
    assert isinstance(second.exception(), PermissionError)
    assert not [*tmp_path.iterdir()]


def test_no_rank_waits_if_the_folder_cannot_be_written(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(_ThreadOfTwo(rank).shares, tmp_path / "missing") for rank in range(2))
    assert isinstance(first.exception(), FileNotFoundError)
    assert isinstance(second.exception(), ProjectError) and "Rank 0 failed: FileNotFoundError" in str(
        second.exception()
    )
