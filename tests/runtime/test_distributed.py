"""Rank, world size and launcher of a process."""

import os

import pytest
from lightning.pytorch.utilities import rank_zero_only

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
