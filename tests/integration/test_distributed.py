"""Two real processes that train together share the rows: each is computed once, by one of them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from project import load
from tests.conftest import SMALL, told

Ddp = Callable[..., tuple[int, str]]

DDP = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
#: The command line, whose processes say how many batches they have trained on.
COUNTING = """
import sys
from project import ImageClassifier
from project.cli import main

def count(self):
    print(f"rank {self.global_rank} has had {self.trainer.global_step} steps", flush=True)

ImageClassifier.on_fit_end = count
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def ddp(here: Path, weights: Path) -> Ddp:
    """Runs a fit in two processes; gives its exit code and all that it said."""
    (here / "count.py").write_text(COUNTING)  # Lightning starts the second process with this file, too
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--trainer.max_epochs", "1", "--features.folder", "store"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> tuple[int, str]:
        command = [sys.executable, "count.py", "fit", *flags, *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        first = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        try:
            said, _ = first.communicate(timeout=60)  # ends when both processes have
        finally:  # of both processes, should they wait for each other for ever
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
        return first.returncode, said

    return run


def test_each_image_is_computed_once_and_both_processes_train(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").unlink()  # 23 images of training and 12 of validation: neither share is even
    flags = ["--data.root", "album", "--data.batch_size", "4", "--features.engine", "torch"]
    code, said = ddp(*flags)
    assert code == 0, said
    assert told(said) == [(0, 35)], "one process speaks, for both"
    assert sorted(re.findall(r"rank (\d) has had (\d+) steps", said)) == [("0", "3"), ("1", "3")]
    sizes = sorted(path.stat().st_size // 2048 for path in Path("store").rglob("*.safetensors"))
    assert sizes == [17, 18], "each process has computed its half"
    assert load("runs/album/version_0/checkpoints/last.ckpt").classes_ == ["blue", "green", "red"]
    code, said = ddp(*flags)
    assert code == 0, said
    assert told(said) == [(35, 0)]


@pytest.mark.parametrize(
    ("engine", "image"),
    [("torch", "val/red/3"), ("auto", "train/blue/0")],  # the last, and the first
    ids=["met by process 1", "met while engines are measured"],
)
def test_an_unreadable_image_ends_all_processes_with_its_name(engine: str, image: str, ddp: Ddp, album: Path) -> None:
    bad = album / f"{image}.png"
    bad.write_bytes(bad.read_bytes()[:1000])
    code, said = ddp("--data.root", "album", "--features.engine", engine)
    assert code != 0
    assert f"album/{image}.png" in said
