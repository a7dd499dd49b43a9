"""Two real processes that train together share the rows: each is computed once, by one of them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from project import load
from tests.conftest import SMALL, told
from tests.integration.launched import TORCHRUN, free_port, run_all

Ddp = Callable[..., tuple[int, str]]

DDP = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
#: The command line, whose processes say how many batches they have trained on.
COUNTING = """
import gc
gc.disable()  # it walks through a million objects of the libraries
import os
import sys
from project import ImageClassifier
from project.cli.main import main
from project.features import builder

def count(self):
    print(f"rank {self.global_rank} has had {self.trainer.global_step} steps", flush=True)

def extract(engine, images, *arguments):
    print(f"rank {os.environ.get('LOCAL_RANK', 0)} computes {len(images)} rows", flush=True)
    return whole(engine, images, *arguments)

whole, builder.extract = builder.extract, extract
ImageClassifier.on_fit_end = count
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def ddp(here: Path, weights: Path) -> Ddp:
    """Runs a fit in two processes; gives its exit code and all that it said."""
    (here / "count.py").write_text(COUNTING)  # Lightning starts the second process with this file, too
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--trainer.max_epochs", "1", "--features.folder", "store"]

    def run(*more: str) -> tuple[int, str]:
        ((code, said),) = run_all([["count.py", "fit", *flags, *more]])  # ends when both processes have
        return code, said

    return run


def test_each_image_is_computed_once_and_both_processes_train(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").unlink()  # 23 images of training and 12 of validation: neither share is even
    flags = ["--data.root", "album", "--data.batch_size", "4", "--features.engine", "torch"]
    code, said = ddp(*flags)
    assert code == 0, said
    assert told(said) == [(0, 35)], "one process speaks, for both"
    assert sorted(re.findall(r"rank (\d) has had (\d+) steps", said)) == [("0", "3"), ("1", "3")]
    computed = dict(re.findall(r"rank (\d) computes (\d+) rows", said))
    assert sorted(computed.items()) == [("0", "17"), ("1", "18")], "each process has computed its half"
    sizes = [path.stat().st_size // 2048 for path in Path("store").rglob("*.safetensors")]
    assert sizes == [35], "the shards of one fit are merged"
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
    assert said.count(f"error: album/{image}.png") == 1, said


def test_an_unreadable_image_met_in_training_is_what_is_said(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").write_bytes(b"no")
    code, said = ddp("--data.root", "album", "--features.cache", "off", "--data.batch_size", "3")
    assert code != 0
    assert said.count("error: album/train/red/7.png") == 1 and "Traceback" not in said, said


#: predict, whose second process dies at its second batch.
DYING = """
import os, signal, sys
from project import ImageClassifier
from project.cli.main import main

step = ImageClassifier.predict_step

def die(self, batch, index):
    if self.global_rank == 1 and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)

ImageClassifier.predict_step = die
sys.exit(main(sys.argv[1:]))
"""
PREDICT = [
    *("predict", "--ckpt_path", "runs/photos/version_0/checkpoints/last.ckpt", "--output", "kept.csv"),
    *("--data.predict", "album/train", "--data.batch_size", "4", *DDP),
]


def test_a_bad_image_of_any_process_ends_predict_and_the_earlier_file_is_kept(run: Path, album: Path) -> None:
    Path("kept.csv").write_text("earlier")
    (album / "train/red/6.png").write_bytes(b"no")  # the last but one of 24: the first process's, in its last batch
    (album / "train/red/7.png").write_bytes(b"no")  # and one of the second's
    ((code, said),) = run_all([["-m", "project", *PREDICT]])
    assert code == 2 and "Traceback" not in said, said
    assert said.count("error: album/train/red/6.png") == 1, "each process says what it alone has met"
    assert Path("kept.csv").read_text() == "earlier" and not list(Path().glob(".kept.csv*"))


def test_a_killed_process_ends_predict_and_the_earlier_file_is_kept(run: Path, album: Path) -> None:
    Path("kept.csv").write_text("earlier")
    Path("die.py").write_text(DYING)
    ((code, said),) = run_all([["die.py", *PREDICT]])
    assert code != 0, said
    assert Path("kept.csv").read_text() == "earlier"  # Lightning kills the first process with the second


def two_nodes(*flags: str) -> list[list[str]]:
    """Two agents of torchrun, as on two machines, with a process each."""
    port = free_port()
    nodes = [*TORCHRUN, "1", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    fit = ["-m", "project", "fit", *flags, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    return [[*nodes, node, *fit] for node in ("0", "1")]


@pytest.fixture
def flags(here: Path, photos: Path, weights: Path) -> list[str]:
    """Of a small fit of several processes."""
    small = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "1"]
    return [*small, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--features.engine", "torch"]


def runs() -> set[str]:
    return {path.relative_to("runs/photos").as_posix().partition(".out.")[0] for path in Path("runs").rglob("*.*")}


FILES = {"config.yaml", "hparams.yaml", "events", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model_card.md"}


def test_two_nodes_of_torchrun_make_one_run(flags: list[str]) -> None:
    (code, said), (other, quiet) = run_all(two_nodes(*flags, "--features.folder", "store"))
    assert (code, other) == (0, 0), said + quiet
    assert told(said) == [(0, 36)] and not told(quiet)
    assert runs() == {f"version_0/{name}" for name in FILES}


def test_features_on_a_disk_of_each_node_are_refused_before_any_is_computed(flags: list[str], here: Path) -> None:
    apart = [{"XDG_CACHE_HOME": str(here / f"node{number}")} for number in range(2)]
    (code, said), (other, quiet) = run_all(two_nodes(*flags), apart)
    assert code != 0 and other != 0
    assert (said + quiet).count("error: ") == 1
    assert "features have to be in a folder that all nodes share" in said.lower() and "--features.folder" in said
    assert "rows to compute" not in said


def test_the_tasks_of_slurm_make_one_run(flags: list[str]) -> None:
    job = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
        **{"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()},
    }
    tasks = [{**job, "SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_LOCALID": "0"} for node in ("0", "1")]
    command = ["-m", "project", "fit", *flags, "--features.folder", "store"]
    command += ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    (code, said), (other, quiet) = run_all([command, command], tasks)
    assert (code, other) == (0, 0), said + quiet
    assert told(said) == [(0, 36)] and not told(quiet)
    assert runs() == {f"version_0/{name}" for name in FILES}
