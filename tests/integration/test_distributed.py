"""Distributed runs in real processes: shared features, errors of one rank, torchrun and SLURM."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from project import ImageClassifier, load
from project.cli.main import main
from project.features import builder
from tests.conftest import FEATURES, SMALL, SOLVED, row_counts
from tests.forked import run_ranks, start
from tests.integration.subprocesses import TORCHRUN, free_port, run_all

Ddp = Callable[..., tuple[int, str]]

DDP = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]


def print_counts() -> None:
    """Print the number of training steps and of computed rows of each rank."""

    def print_steps(model: ImageClassifier) -> None:
        print(f"rank {model.global_rank}: {model.trainer.global_step} steps")

    def print_rows(engine: Any, images: Any, *arguments: Any) -> Any:
        print(f"rank {os.environ['LOCAL_RANK']}: {len(images)} rows")
        return extract(engine, images, *arguments)

    extract, builder.extract = builder.extract, print_rows  # type: ignore[assignment]
    ImageClassifier.on_fit_end = print_steps  # type: ignore[method-assign, assignment]


@pytest.fixture
def ddp(here: Path, weights: Path) -> Ddp:
    """Runs a fit in two processes and returns its exit code and output."""
    flags = [*SMALL, *DDP, "--model.weights", str(weights), "--trainer.max_epochs", "1", "--features.folder", "store"]
    return lambda *more: join(run_ranks(here, ["fit", *flags, *more], prepare=print_counts))


def join(ranks: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """Exit code and output of all ranks together."""
    return max(code for code, _ in ranks), "".join(output for _, output in ranks)


def test_each_row_is_computed_once_and_both_processes_train(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").unlink()  # 23 training and 12 validation images do not divide evenly
    flags = ["--data.root", "album", "--data.batch_size", "4", "--features.engine", "torch"]
    code, output = ddp(*flags)
    assert code == 0, output
    assert row_counts(output) == [(0, 35)], "only rank zero logs"
    assert sorted(re.findall(r"rank (\d): (\d+) steps", output)) == [("0", "3"), ("1", "3")]
    assert sorted(re.findall(r"rank (\d): (\d+) rows", output)) == [("0", "17"), ("1", "18")]
    rows_per_shard = [len(load_file(path)["keys"]) for path in Path("store").rglob("*.safetensors")]
    assert rows_per_shard == [35], "the shards of one fit are merged"
    assert load("runs/album/version_0/checkpoints/last.ckpt").classes_ == ["blue", "green", "red"]
    code, output = ddp(*flags)
    assert code == 0, output
    assert row_counts(output) == [(35, 0)]


def test_two_processes_solve_the_head_of_one(ddp: Ddp, album: Path, weights: Path) -> None:
    """They sum their gradients; the epochs with a learning rate of 0 keep the head."""
    (album / "train/red/7.png").unlink()  # 23 images do not divide evenly
    flags = [*SOLVED, "--model.label_smoothing", "0.2", "--data.root", "album", "--features.engine", "torch"]
    flags += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0"]
    code, output = ddp(*flags)
    assert code == 0, output
    assert output.count("Head: solved in") == output.count("Epoch 0, the solved head: ") == 1
    alone = [*SMALL, "--model.weights", str(weights), "--trainer.max_epochs", "1", "--features.folder", "store"]
    assert main(["fit", *alone, *flags, "--trainer.accelerator", "cpu"]) == 0
    checkpoints = (Path(f"runs/album/version_{number}/checkpoints/best.ckpt") for number in range(2))
    two, one = (torch.load(path, weights_only=True)["state_dict"] for path in checkpoints)
    torch.testing.assert_close(two["head.weight"], one["head.weight"], atol=2e-3, rtol=0.02)
    torch.testing.assert_close(two["head.bias"], one["head.bias"], atol=2e-3, rtol=0.02)


def test_two_processes_compute_a_head_that_is_not_trained(ddp: Ddp, album: Path) -> None:
    """DistributedDataParallel refuses a model without trainable parameters."""
    flags = [*SOLVED, "--data.root", "album", "--features.engine", "torch"]
    code, output = ddp(*flags, "--model.head", "project.models.heads.KNNHead")
    assert code == 0, output
    assert output.count("Head: computed in") == output.count("Epoch 0, the computed KNNHead: ") == 1
    rows = torch.load("runs/album/version_0/checkpoints/best.ckpt", weights_only=True)["state_dict"]["head.rows"]
    assert rows.shape == (24, FEATURES)


@pytest.mark.parametrize("features", ["on", "off"])
@pytest.mark.parametrize("epochs", ["0", "1"])
def test_two_processes_calibrate_the_answers_of_one(
    features: str, epochs: str, ddp: Ddp, album: Path, weights: Path
) -> None:
    """Without stored features, no rank holds those of all training images, so these do not calibrate."""
    (album / "train/red/7.png").unlink()  # neither 23 training nor 11 validation images divide evenly
    (album / "val/red/3.png").unlink()
    flags = [*SOLVED, "--data.root", "album", "--features.engine", "torch", "--features.cache", features]
    flags += ["--trainer.max_epochs", epochs, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    code, output = ddp(*flags, "--data.batch_size", "4")
    assert code == 0, output
    assert output.count("Answers: calibrated in") == 1
    alone = [*SMALL, "--model.weights", str(weights), "--features.folder", "store", "--trainer.accelerator", "cpu"]
    assert main(["fit", *alone, *flags, "--data.batch_size", "8"]) == 0
    states = (
        torch.load(f"runs/album/version_{number}/checkpoints/best.ckpt", weights_only=True) for number in range(2)
    )
    two, one = (state["answers"] for state in states)
    assert two["validation"] == one["validation"] == 11
    count = 11 if features == "off" else len(one["confidence"])
    assert len(two["confidence"]) == count
    for name in ("confidence", "distances"):  # the order of validation images differs
        two_values, one_values = two[name][:11].sort().values, one[name][:11].sort().values
        torch.testing.assert_close(two_values, one_values, atol=5e-3, rtol=0.02)
        torch.testing.assert_close(two[name][11:], one[name][11:count], atol=5e-3, rtol=0.02)
    assert (two["rows"].int() - one["rows"].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("engine", "image"),
    [("torch", "val/red/3"), ("auto", "train/blue/0")],  # the last, and the first
    ids=["read by rank 1", "read while engines are measured"],
)
def test_unreadable_image_stops_all_processes_and_is_named_once(engine: str, image: str, ddp: Ddp, album: Path) -> None:
    bad = album / f"{image}.png"
    bad.write_bytes(bad.read_bytes()[:1000])
    code, output = ddp("--data.root", "album", "--features.engine", engine)
    assert code != 0
    assert output.count(f"error: album/{image}.png") == 1, output


def test_unreadable_image_of_the_calibration_is_named_once(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").write_bytes(b"no")
    flags = ["--features.cache", "off", "--trainer.limit_train_batches", "1", "--data.batch_size", "1"]
    code, output = ddp("--data.root", "album", *flags)
    assert code != 0
    assert "Epoch 1/1" in output and output.count("error: album/train/red/7.png") == 1, output


def test_unreadable_image_in_a_live_fit_is_named_once(ddp: Ddp, album: Path) -> None:
    (album / "train/red/7.png").write_bytes(b"no")
    code, output = ddp("--data.root", "album", "--features.cache", "off", "--data.batch_size", "3")
    assert code != 0
    assert output.count("error: album/train/red/7.png") == 1 and "Traceback" not in output, output


#: The command line of a rank 1 that kills itself at its second batch of ``predict``.
DYING = """
import os, signal, sys
from project import ImageClassifier
from project.cli.main import main

step = ImageClassifier.predict_step

def die(self, batch, index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)

ImageClassifier.predict_step = die
sys.exit(main(sys.argv[1:]))
"""
PREDICT = [
    *("predict", "--ckpt_path", "runs/photos/version_0/checkpoints/last.ckpt", "--output", "out.csv"),
    *("--data.predict", "album/train", "--data.batch_size", "4", "--data.num_workers", "0", *DDP),
]


def test_bad_image_of_any_rank_stops_predict_and_keeps_an_earlier_file(run: Path, album: Path) -> None:
    Path("out.csv").write_text("earlier")
    (album / "train/green/3.png").write_bytes(b"no")  # the last of the twelve images of rank 0
    (album / "train/red/7.png").write_bytes(b"no")  # the last of rank 1
    code, output = join(run_ranks(Path().resolve(), [*PREDICT, "--on_bad_image", "stop"]))
    assert code == 2 and "Traceback" not in output, output
    assert output.count("error: album/train/green/3.png") == 1, "each rank reports only its own images"
    assert Path("out.csv").read_text() == "earlier"
    assert not list(Path().glob(".out.csv*"))


def test_killed_rank_stops_predict_and_keeps_an_earlier_file(run: Path, album: Path) -> None:
    Path("out.csv").write_text("earlier")
    Path("die.py").write_text(DYING)
    predict = start(Path().resolve(), PREDICT, script="die.py")
    assert predict.wait() != 0, predict.output
    assert Path("out.csv").read_text() == "earlier"  # Lightning kills rank 0 with rank 1


def two_nodes(*flags: str) -> list[list[str]]:
    """Two torchrun agents, as on two machines, with one process each."""
    port = free_port()
    nodes = [*TORCHRUN, "1", "--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    fit = ["-m", "project", "fit", *flags, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    return [[*nodes, node, *fit] for node in ("0", "1")]


@pytest.fixture
def flags(here: Path, photos: Path, weights: Path) -> list[str]:
    """Flags of a small distributed fit."""
    small = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "1"]
    return [*small, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--features.engine", "torch"]


def assert_one_run() -> None:
    names = {"config.yaml", "hparams.yaml", "events", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "model_card.md"}
    files = {path.relative_to("runs/photos").as_posix().partition(".out.")[0] for path in Path("runs").rglob("*.*")}
    assert files == {f"version_0/{name}" for name in names}


def test_two_torchrun_nodes_write_one_run(flags: list[str], resnet18_weights: Path) -> None:
    flags += ["--model.backbone", "resnet18", "--model.weights", str(resnet18_weights)]  # imports no timm
    (code, output), (code_1, output_1) = run_all(two_nodes(*flags, "--features.folder", "store"))
    assert (code, code_1) == (0, 0), output + output_1
    assert row_counts(output) == [(0, 36)] and not row_counts(output_1)
    assert_one_run()


def test_feature_folders_local_to_each_node_are_refused_before_extraction(flags: list[str], here: Path) -> None:
    nodes = [
        {"XDG_CACHE_HOME": str(here / f"node{n}"), "GROUP_RANK": str(n), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for n in range(2)
    ]
    fit = ["fit", *flags, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    (code, output), (code_1, output_1) = run_ranks(here, fit, nodes)
    assert code != 0 and code_1 != 0
    assert (output + output_1).count("error: ") == 1
    assert "store features in a folder that all nodes share" in output.lower() and "--features.folder" in output
    assert "rows to compute" not in output


def test_two_slurm_tasks_write_one_run(flags: list[str], here: Path) -> None:
    job = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"},
        **{"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()},
    }
    tasks = [{**job, "SLURM_PROCID": node, "SLURM_NODEID": node, "SLURM_LOCALID": "0"} for node in ("0", "1")]
    fit = ["fit", *flags, "--features.folder", "store", "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    (code, output), (code_1, output_1) = [
        (run.wait(), run.output)
        for run in [start(here, fit, environment=task, log=f"task{task['SLURM_PROCID']}.txt") for task in tasks]
    ]
    assert (code, code_1) == (0, 0), output + output_1
    assert row_counts(output) == [(0, 36)] and not row_counts(output_1)
    assert_one_run()
