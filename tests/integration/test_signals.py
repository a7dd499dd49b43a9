"""SIGTERM and SIGINT: the fit is saved, the exit code is the signal's, and the resume command is printed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.forked import Run, start
from tests.integration.test_distributed import DDP
from tests.integration.test_exact_resume import assert_identical

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 10  # until the process must have ended

#: The command line with slow training steps, in which each rank prints its process id.
SLOW_CLI = """
import os, sys, time
from project import ImageClassifier
from project.cli.main import main

step = ImageClassifier.training_step

def slow_step(self, batch, batch_idx):
    print(f"rank {self.global_rank} is {os.getpid()} in step {self.trainer.global_step}.", flush=True)
    time.sleep(0.2)
    return step(self, batch, batch_idx)

ImageClassifier.training_step = slow_step
sys.exit(main(sys.argv[1:]))
"""

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


def test_second_ctrl_c_stops_at_once(here: Path, photos: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW_CLI.replace("0.2", "600"))
    flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
    with _CliProcess(here, [*flags]) as run:
        run.await_text("in step 0.")
        run.signal(signal.SIGINT)
        run.await_text("saving after this batch")
        time.sleep(1)
        start_time = time.monotonic()
        run.signal(signal.SIGINT)
        assert run.wait() == 130
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


class _CliProcess(Run):
    """The command line in its own process group, as a user starts it, with all child processes."""

    def __init__(self, here: Path, flags: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        self.log = here / "log.txt"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "slow.py", "fit", *flags],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "_CliProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self.members():
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def wait(self, seconds: float = SECONDS) -> int:
        return self.popen.wait(seconds)

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def await_text(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.popen.poll() is None and time.monotonic() < deadline, (
                f"no {text!r} in the output: {self.output}"
            )
            time.sleep(0.01)

    def members(self) -> list[int]:
        """Ids of the group's running processes."""
        running = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended in the meantime
                continue
            if int(fields[2]) == self.popen.pid and fields[0] != "Z":
                running.append(int(stat.parent.name))
        return running


@pytest.fixture
def two_ranks(here: Path, photos: Path, weights: Path) -> Iterator[_CliProcess]:
    """A fit of two ranks, in a training step."""
    (here / "slow.py").write_text(SLOW_CLI)
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "4"]
    with _CliProcess(here, [*flags, "--trainer.max_epochs", "50", "--features.folder", "store"]) as run:
        run.await_text("rank 0 is")
        run.await_text("rank 1 is")
        run.await_text("in step 4.")
        yield run


def test_data_loader_workers_ignore_signals_until_the_fit_has_saved(here: Path, photos: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW_CLI)
    flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
    flags += ["--features.cache", "off", "--data.num_workers", "2", "--data.batch_size", "4"]
    for number, code in SIGNALS.items():
        with _CliProcess(here, [*flags, "--trainer.max_epochs", "50"]) as run:
            run.await_text("in step 2.")
            assert len(run.members()) > 2
            os.killpg(run.popen.pid, number)  # like a terminal and a job scheduler
            assert run.wait() == code, run.output
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
    number: int, rank: int, two_ranks: _CliProcess, here: Path
) -> None:
    match = re.search(rf"rank {rank} is (\d+)", two_ranks.output)
    assert match
    start_time = time.monotonic()
    os.kill(int(match[1]), number)
    assert two_ranks.wait() == SIGNALS[signal.Signals(number)], two_ranks.output
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
    here: Path, photos: Path, weights: Path
) -> None:
    (here / "slow.py").write_text(SLOW_CLI)
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "4"]
    flags += [
        "--model.head",
        "project.models.heads.MLPHead",
        "--model.head.dropout",
        "0.5",
        "--features.folder",
        "store",
    ]
    flags += ["--trainer.max_epochs", "4", "--features.engine", "torch"]
    with _CliProcess(here, flags) as uninterrupted:
        assert uninterrupted.wait(90) == 0, uninterrupted.output
    with _CliProcess(here, flags) as stopped:
        stopped.await_text("in step 4.")
        stopped.signal(signal.SIGTERM)
        assert stopped.wait() == 143, stopped.output
    with _CliProcess(here, [*flags, "--ckpt_path", "last"]) as resumed:
        assert resumed.wait(90) == 0, resumed.output
    expected, resumed_last = (
        torch.load(here / f"runs/photos/version_{n}/checkpoints/last.ckpt", weights_only=True) for n in (0, 2)
    )
    for key in ("state_dict", "optimizer_states", "loops", "resume"):
        assert_identical(resumed_last[key], expected[key], key)
