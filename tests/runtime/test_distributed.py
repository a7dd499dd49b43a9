"""Which rank a process has, and what has started it."""

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
    processes,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_the_first_of_one() -> None:
    assert is_rank_zero() and is_first_process() and not is_externally_launched()
    assert launcher_pid() is None
    assert environment_rank() == (0, 1)
    assert (processes(), ProcessGroup().rank, ProcessGroup().size) == (1, 0, 1)


def test_lightning_says_which_rank_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not is_rank_zero() and not is_first_process()


def test_of_another_node_it_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_rank_zero() and not is_first_process()


def test_the_environment_says_who_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launcher_pid() == os.getppid(), "Lightning's first process on this machine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert is_externally_launched() and launcher_pid() is None
    assert environment_rank() == (5, 8)
