"""Which rank a process has, and what has started it."""

import os

import pytest
from lightning.pytorch.utilities import rank_zero_only

from project.runtime.distributed import (
    Ranks,
    environment_rank,
    is_first_process,
    is_rank_zero,
    launched,
    launcher,
    processes,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_alone_is_the_first_of_one() -> None:
    assert is_rank_zero() and is_first_process() and not launched()
    assert launcher() is None
    assert environment_rank() == (0, 1)
    assert (processes(), Ranks().rank, Ranks().size) == (1, 0, 1)


def test_lightning_says_which_rank_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not is_rank_zero() and not is_first_process()


def test_of_another_node_it_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_rank_zero() and not is_first_process()


def test_the_environment_says_who_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launcher() == os.getppid(), "Lightning's first process on this machine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched() and launcher() is None
    assert environment_rank() == (5, 8)
