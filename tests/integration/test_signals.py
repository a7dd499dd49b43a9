"""SIGTERM and SIGINT: what is done is saved, the exit code is the signal's, and how to go on is said."""

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
from tests.integration.test_resume import same

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 10  # within which it has to be gone

#: The command line, whose steps take a while, and whose processes say who they are when they have begun.
SLOW = """
import os, sys, time
from project import ImageClassifier
from project.cli.main import main

step = ImageClassifier.training_step

def slowly(self, batch, batch_idx):
    print(f"rank {self.global_rank} is {os.getpid()} in step {self.trainer.global_step}.", flush=True)
    time.sleep(0.2)
    return step(self, batch, batch_idx)

ImageClassifier.training_step = slowly
sys.exit(main(sys.argv[1:]))
"""

Begin = Callable[..., Run]


@pytest.fixture
def begin(here: Path, photos: Path, weights: Path) -> Begin:
    def run(*more: str, verb: str = "fit", at: dict[str, object] | None = None) -> Run:
        flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
        return start(here, [verb, *flags, *more], at)

    return run


@pytest.mark.parametrize("number", SIGNALS)
def test_a_fit_that_is_stopped_says_how_to_go_on_and_goes_on_by_it(number: int, begin: Begin, here: Path) -> None:
    flags = ["--trainer.max_epochs", "3", "--data.batch_size", "8", "--features.engine", "torch"]
    run = begin(*flags, at={"step": 4, "number": number})
    assert run.wait(SECONDS + 30) == SIGNALS[signal.Signals(number)]
    assert "Traceback" not in run.said
    found = re.search(r"Stopped by (\w+) after batch 2 of epoch 1, which is saved. Go on with:\n(.*)\n", run.said)
    assert found, run.said
    assert found[1] == signal.Signals(number).name
    command = found[2].split()
    assert command[:4] == ["python", "-m", "project", "fit"]
    assert command[-2:] == ["--ckpt_path", "runs/photos/version_0/checkpoints/last.ckpt"]
    resumed = start(here, command[3:])
    assert resumed.wait() == 0, resumed.said
    last = torch.load(here / "runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 9


def test_a_second_ctrl_c_leaves_at_once(here: Path, photos: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW.replace("0.2", "600"))
    flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
    with _real(here, [*flags]) as run:
        run.await_text("in step 0.")
        run.signal(signal.SIGINT)
        run.await_text("saving after this batch")
        time.sleep(1)
        began = time.monotonic()
        run.signal(signal.SIGINT)
        assert run.wait() == 130
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["validate", "predict", "check"])
def test_other_verbs_end_with_the_exit_code_of_the_signal(
    verb: str, number: int, here: Path, run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))  # what another test has indexed is not read again
    flags = [] if verb == "check" else ["--ckpt_path", str(run / "checkpoints/best.ckpt")]
    flags += ["--data.num_workers", "0"]
    flags += ["--data.predict", str(photos)] if verb == "predict" else ["--data.root", str(photos)]
    stopped = start(here, [verb, *flags], {"number": number, "reads": 5})
    assert stopped.wait() == SIGNALS[signal.Signals(number)], stopped.said
    assert f"Stopped by {signal.Signals(number).name}." in stopped.said
    assert "Traceback" not in stopped.said
    assert not Path("predictions.csv").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_stopped_while_rows_are_computed_it_ends_and_the_next_fit_begins_anew(number: int, begin: Begin) -> None:
    run = begin("--features.engine", "torch", "--features.folder", "store", at={"number": number, "reads": 30})
    assert run.wait(SECONDS) == SIGNALS[signal.Signals(number)], run.said
    assert f"Stopped by {signal.Signals(number).name}." in run.said and "Traceback" not in run.said
    resumed = begin("--features.engine", "torch", "--trainer.max_epochs", "1", "--ckpt_path", "last")
    assert resumed.wait() == 0, resumed.said
    assert "there is no last.ckpt under runs/photos yet; a new fit" in resumed.said


class _Real(Run):
    """A command line as a user starts it, and all processes that it has started."""

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

    def __enter__(self) -> "_Real":
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
        until = time.monotonic() + seconds
        while text not in self.said:
            assert self.popen.poll() is None and time.monotonic() < until, f"it never said {text!r}: {self.said}"
            time.sleep(0.01)

    def members(self) -> list[int]:
        """Its processes that are alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if int(fields[2]) == self.popen.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


def _real(here: Path, flags: list[str]) -> _Real:
    return _Real(here, flags)


@pytest.fixture
def two(here: Path, photos: Path, weights: Path) -> Iterator[_Real]:
    """A fit of two processes, in a step."""
    (here / "slow.py").write_text(SLOW)
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "4"]
    with _real(here, [*flags, "--trainer.max_epochs", "50", "--features.folder", "store"]) as run:
        run.await_text("rank 0 is")
        run.await_text("rank 1 is")
        run.await_text("in step 4.")
        yield run


def test_processes_that_load_images_leave_it_to_the_fit_when_to_stop(here: Path, photos: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW)
    flags = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.root", str(photos)]
    flags += ["--features.cache", "off", "--data.num_workers", "2", "--data.batch_size", "4"]
    for number, code in SIGNALS.items():
        with _real(here, [*flags, "--trainer.max_epochs", "50"]) as run:
            run.await_text("in step 2.")
            assert len(run.members()) > 2
            os.killpg(run.popen.pid, number)  # as a terminal and a scheduler do
            assert run.wait() == code, run.said
            assert "Go on with:" in run.said and "Traceback" not in run.said


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", SIGNALS)
def test_two_processes_save_and_leave_whichever_of_them_is_told(number: int, rank: int, two: _Real, here: Path) -> None:
    told = re.search(rf"rank {rank} is (\d+)", two.said)
    assert told
    began = time.monotonic()
    os.kill(int(told[1]), number)
    assert two.wait() == SIGNALS[signal.Signals(number)], two.said
    while two.members():
        assert time.monotonic() - began < SECONDS, two.said
        time.sleep(0.05)
    assert two.said.count("Go on with:") == 1, two.said
    assert "Traceback" not in two.said
    last = torch.load(here / "runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] >= 4
    assert len(last["resume"]["processes"]) == 2


@pytest.mark.long
def test_two_processes_that_go_on_are_the_fit_that_never_stopped(here: Path, photos: Path, weights: Path) -> None:
    (here / "slow.py").write_text(SLOW)
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
    with _real(here, flags) as whole:
        assert whole.wait(90) == 0, whole.said
    with _real(here, flags) as stopped:
        stopped.await_text("in step 4.")
        stopped.signal(signal.SIGTERM)
        assert stopped.wait() == 143, stopped.said
    with _real(here, [*flags, "--ckpt_path", "last"]) as resumed:
        assert resumed.wait(90) == 0, resumed.said
    first, last = (
        torch.load(here / f"runs/photos/version_{n}/checkpoints/last.ckpt", weights_only=True) for n in (0, 2)
    )
    for part in ("state_dict", "optimizer_states", "loops", "resume"):
        same(last[part], first[part], part)
