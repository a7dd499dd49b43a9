"""SIGTERM and SIGINT: the fit is saved, the exit code is the signal's, and the resume command is printed."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from project.classifier import ImageClassifier
from tests.conftest import SMALL
from tests.forked import Run, start
from tests.integration.test_distributed import DDP
from tests.integration.test_exact_resume import assert_identical

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 10  # until the process must have ended

#: The command line with slow training steps, for the processes that Lightning launches.
SLOW_CLI = """
import sys
from project.cli.main import main
from tests.integration.test_signals import slow_down

slow_down(0.2)
sys.exit(main(sys.argv[1:]))
"""


def slow_down(seconds: float) -> None:
    """Make training steps slow; each prints its rank and its process id."""
    step = ImageClassifier.training_step

    def slow_step(self: ImageClassifier, batch: Any, batch_idx: int) -> Any:
        print(f"rank {self.global_rank} is {os.getpid()} in step {self.trainer.global_step}.", flush=True)
        time.sleep(seconds)
        return step(self, batch, batch_idx)

    ImageClassifier.training_step = slow_step  # type: ignore[method-assign]


def lead_group(seconds: float) -> None:
    """Prepare a child process with slow training steps in its own process group."""
    os.setsid()
    slow_down(seconds)


StartCli = Callable[..., Run]


@pytest.fixture
def start_cli(here: Path, photos: Path, weights: Path) -> StartCli:
    def run(*more: str, verb: str = "fit", at: dict[str, object] | None = None) -> Run:
        flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
        return start(here, [verb, *flags, *more], at)

    return run


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_fit_prints_a_resume_command_that_works(number: int, start_cli: StartCli, here: Path) -> None:
    flags = ["--trainer.max_epochs", "3", "--data.batch_size", "8", "--features.engine", "torch"]
    run = start_cli(*flags, at={"step": 4, "number": number})
    assert run.wait(SECONDS + 30) == SIGNALS[signal.Signals(number)]
    assert "Traceback" not in run.output
    match = re.search(r"Stopped by (\w+) after batch 2 of epoch 1; saved. Resume with:\n(.*)\n", run.output)
    assert match, run.output
    assert match[1] == signal.Signals(number).name
    command = match[2].split()
    assert command[:4] == ["python", "-m", "project", "fit"]
    assert command[-2:] == ["--ckpt_path", "runs/photos/version_0/checkpoints/last.ckpt"]
    resumed = start(here, command[3:])
    assert resumed.wait() == 0, resumed.output
    last = torch.load(here / "runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 9


def test_second_ctrl_c_stops_at_once(start_group: Callable[..., "Group"]) -> None:
    with start_group(seconds=600) as run:
        run.await_text("in step 0.")
        run.signal(signal.SIGINT)
        run.await_text("saving after this batch")
        time.sleep(1)
        start_time = time.monotonic()
        run.signal(signal.SIGINT)
        assert run.wait(SECONDS) == 130
        assert time.monotonic() - start_time < 2


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["validate", "predict", "check"])
def test_other_verbs_exit_with_the_signals_code(
    verb: str, number: int, here: Path, run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))  # an index of another test would save the reads
    flags = [] if verb == "check" else ["--ckpt_path", str(run / "checkpoints/best.ckpt")]
    flags += ["--data.num_workers", "0"]
    flags += ["--data.predict", str(photos)] if verb == "predict" else ["--data.root", str(photos)]
    stopped = start(here, [verb, *flags], {"number": number, "reads": 5})
    assert stopped.wait() == SIGNALS[signal.Signals(number)], stopped.output
    assert f"Stopped by {signal.Signals(number).name}." in stopped.output
    assert "Traceback" not in stopped.output
    assert not Path("predictions.csv").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_during_feature_extraction_stops_and_the_next_fit_starts_anew(number: int, start_cli: StartCli) -> None:
    run = start_cli("--features.engine", "torch", "--features.folder", "store", at={"number": number, "reads": 30})
    assert run.wait(SECONDS) == SIGNALS[signal.Signals(number)], run.output
    assert f"Stopped by {signal.Signals(number).name}." in run.output and "Traceback" not in run.output
    resumed = start_cli("--features.engine", "torch", "--trainer.max_epochs", "1", "--ckpt_path", "last")
    assert resumed.wait() == 0, resumed.output
    assert "no last.ckpt under runs/photos yet; starting a new fit" in resumed.output


class Group(Run):
    """A fit with slow steps as the leader of a process group, with all of its child processes."""

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        if self.members():
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def members(self) -> list[int]:
        """Ids of the group's running processes."""
        running = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended in the meantime
                continue
            if int(fields[2]) == self.pid and fields[0] != "Z":
                running.append(int(stat.parent.name))
        return running


@pytest.fixture
def start_group(here: Path, photos: Path, weights: Path) -> Callable[..., Group]:
    def run(*more: str, seconds: float = 0.2) -> Group:
        (here / "slow.py").write_text(SLOW_CLI)
        flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.accelerator", "cpu"]
        flags += ["--data.batch_size", "4", *more]
        started = start(here, ["fit", *flags], prepare=partial(lead_group, seconds), script="slow.py")
        return Group(started.process, started.log)

    return run


@pytest.fixture
def two_ranks(start_group: Callable[..., Group]) -> Iterator[Group]:
    """A fit of two ranks, in a training step."""
    with start_group(*DDP, "--trainer.max_epochs", "50", "--features.folder", "store") as run:
        run.await_text("rank 0 is")
        run.await_text("rank 1 is")
        run.await_text("in step 4.")
        yield run


def test_data_loader_workers_ignore_signals_until_the_fit_has_saved(start_group: Callable[..., Group]) -> None:
    for number, code in SIGNALS.items():
        flags = ["--features.cache", "off", "--data.num_workers", "2", "--trainer.max_epochs", "50"]
        with start_group(*flags) as run:
            run.await_text("in step 2.")
            assert len(run.members()) > 2
            os.killpg(run.pid, number)  # like a terminal and a job scheduler
            assert run.wait(SECONDS) == code, run.output
            assert "Resume with:" in run.output and "Traceback" not in run.output


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 0),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.long),
    ],
)
def test_two_ranks_save_and_exit_whichever_receives_the_signal(
    number: int, rank: int, two_ranks: Group, here: Path
) -> None:
    match = re.search(rf"rank {rank} is (\d+)", two_ranks.output)
    assert match
    start_time = time.monotonic()
    os.kill(int(match[1]), number)
    assert two_ranks.wait(SECONDS) == SIGNALS[signal.Signals(number)], two_ranks.output
    while two_ranks.members():
        assert time.monotonic() - start_time < SECONDS, two_ranks.output
        time.sleep(0.05)
    assert two_ranks.output.count("Resume with:") == 1, two_ranks.output
    assert "Traceback" not in two_ranks.output
    last = torch.load(here / "runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] >= 4
    assert len(last["resume"]["processes"]) == 2


@pytest.mark.long
def test_resumed_fit_of_two_ranks_is_bit_identical_to_an_uninterrupted_one(
    here: Path, start_group: Callable[..., Group]
) -> None:
    flags = [*DDP, "--model.head", "project.models.heads.MLPHead", "--model.head.dropout", "0.5"]
    flags += ["--trainer.max_epochs", "4", "--features.engine", "torch", "--features.folder", "store"]
    with start_group(*flags) as uninterrupted:
        assert uninterrupted.wait(90) == 0, uninterrupted.output
    with start_group(*flags) as stopped:
        stopped.await_text("in step 4.")
        stopped.signal(signal.SIGTERM)
        assert stopped.wait(SECONDS) == 143, stopped.output
    with start_group(*flags, "--ckpt_path", "last") as resumed:
        assert resumed.wait(90) == 0, resumed.output
    expected, resumed_last = (
        torch.load(here / f"runs/photos/version_{n}/checkpoints/last.ckpt", weights_only=True) for n in (0, 2)
    )
    for key in ("state_dict", "optimizer_states", "loops", "resume"):
        assert_identical(resumed_last[key], expected[key], key)
