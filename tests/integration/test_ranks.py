"""Runs of two processes give the same weights, metrics, predictions and files as runs of one."""

import csv
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from project.cli.transfer_cli import TransferCLI
from project.runtime.signals import SignalHandler
from tests.conftest import SMALL, draw, scalars
from tests.forked import run_ranks

LIVE = "--features.cache off --model.head_init auto"
#: Batch size of all processes together, and flags. There are 23 training images.
FITS: dict[str, tuple[int, str]] = {
    "last batch of one image": (22, ""),
    "last batch of three images": (10, ""),
    "live": (8, "--features.cache off --data.augment flip"),
    "batch size above the number of images": (32, ""),
    "class weights and label smoothing": (20, "--model.class_weights [1,5,0.2] --model.label_smoothing 0.1"),
    "balanced sampler": (6, "--data.balance sampler"),
    "accumulate_grad_batches": (4, "--trainer.accumulate_grad_batches 2"),
    "overfit_batches": (6, "--trainer.overfit_batches 2"),
    "one validation image": (8, "--data.root few"),
    "three cuts": (
        8,
        "--model.backbone timm/test_convnext --model.weights null --trainer.max_epochs 3 --model.schedule "
        + '{"0":"head","1":"stage4","2":"stage2"}',
    ),
    "mixup": (8, "--features.cache off --data.mixup 0.4 --data.cutmix 1.0"),
    "solved, not stored": (8, f"{LIVE} --trainer.max_epochs 1"),
    "computed, not stored": (8, f"{LIVE} --trainer.max_epochs 1 --model.head project.models.heads.CosineHead"),
    "BatchNorm": (4, "--model.trainable layer4 --model.batch_norm train --model.ema 0.9 --trainer.max_epochs 1"),
    "average": (4, "--model.trainable layer4 --model.ema 0.9 --model.l2_sp 0.01"),
    "low-rank updates, averaged": (
        8,
        "--model.trainable layer3 --model.adapter lora --model.ema 0.9 --model.interpolate auto --model.lr_decay 0.5",
    ),
}
#: Fits that depend on the number of processes: mixup pairs images, and BatchNorm computes statistics, per process.
DIFFERENT = ("mixup", "BatchNorm")
EVALUATIONS = ("validate", "test", "validate --data.root few", "test --data.root few")
#: Number of images of each folder to predict.
PREDICTED = {"odd": 7, "fewer than processes": 1}


def run_lines(lines: list[list[str]], folder: Path) -> None:
    """Run several command lines in this process, write their metrics, and exit."""
    for name, *arguments in lines:
        cli = TransferCLI(arguments, SignalHandler(), "")
        values = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
        average = getattr(cli.model, "average", None)
        if average is not None:
            values |= {f"average/{key}": float(value.double().sum()) for key, value in average.tensors.items()}
        (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(values))
    sys.exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Path]:
    """A folder with the outputs of the same command lines by one process, in ``1``, and by two, in ``2``."""
    here = tmp_path_factory.mktemp("ranks")
    for label, (name, counts) in enumerate({"a": (9, 4, 3), "b": (8, 3, 1), "c": (6, 2, 1)}.items()):
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            for number in range(count):
                draw(
                    here / "photos" / split / name / f"{number}.png",
                    (80 + 40 * label, 120, 160),
                    image_seed(name, split, number),
                )
        for number in range(8):
            path, seed = here / "few/train" / name / f"{number}.png", image_seed(name, "few", number)
            draw(path, (80 + 40 * label, 120, 160), seed)
    for split in ("val", "test"):
        draw(here / "few" / split / "b" / "0.png", (120, 120, 160), 5)
    for folder, count in PREDICTED.items():
        for number in range(count):
            draw(here / folder / f"{number}.png", (40 * number, 120, 160), number)
    for processes in (1, 2):
        (here / str(processes)).mkdir()
        lines = list(command_lines(processes, weights))
        ranks = run_ranks(here, [], [{}] * processes, partial(run_lines, lines, here / str(processes)), seconds=300)
        for code, output in ranks:
            assert code == 0, output
    yield here


def image_seed(name: str, split: str, number: int) -> int:
    return sum(map(ord, name + split)) * 100 + number


def command_lines(processes: int, weights: Path) -> Iterator[list[str]]:
    """Name and arguments of each command line."""
    small = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu"]
    small += ["--trainer.enable_progress_bar", "false", "--features.folder", f"{processes}/store"]
    if processes == 2:
        small += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    fit = ["fit", *small, "--data.root", "photos", "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.05"]
    for name, (batch, flags) in FITS.items():
        size = ["--data.batch_size", str(batch // processes), "--trainer.default_root_dir", f"{processes}/runs"]
        yield [name, *fit, *size, "--name", name, *flags.split()]
    checkpoint, second = (
        ["--ckpt_path", str(checkpoint_path(processes, name))] for name in ("last batch of three images", "live")
    )
    for name in EVALUATIONS:
        verb, *flags = name.split()
        data = ["--data.root", "photos", *flags, "--data.batch_size", str(4 // processes)]
        yield [name, verb, *small, *checkpoint, *data]
    for folder in PREDICTED:
        output = ["--output", f"{processes}/{folder}.csv", "--data.batch_size", "2"]
        yield [folder, "predict", *small, *checkpoint, "--data.predict", folder, *output]
    options = small[small.index("--trainer.accelerator") :]  # those of the model come from the checkpoints
    output = ["--output", f"{processes}/two tasks.csv", "--data.batch_size", "2", "--data.num_workers", "0"]
    yield ["two tasks", "predict", *checkpoint, *second, *options, "--data.predict", "odd", *output]


def checkpoint_path(processes: int, name: str, which: str = "last") -> Path:
    return Path(str(processes), "runs", name, "version_0", "checkpoints", f"{which}.ckpt")


def metrics(run: Path) -> dict[str, list[float]]:
    """Values of each metric per epoch."""
    events = scalars(run)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "val/")) and "per_second" not in tag]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def load_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("name", [name for name in FITS if name not in DIFFERENT])
def test_fit_of_two_processes_equals_fit_of_one_with_twice_the_batch_size(name: str, results: Path) -> None:
    one, two = (metrics(results / str(n) / "runs" / name / "version_0") for n in (1, 2))
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1", "val/ece"} <= one.keys()
    for tag, values in one.items():
        assert two[tag] == pytest.approx(values, abs=1e-5), tag
    expected, actual = (load_checkpoint(results / checkpoint_path(n, name)) for n in (1, 2))
    assert actual["global_step"] == expected["global_step"]
    # The solver stops when the loss is accurate to 1e-8; the weights are less accurate, as the loss is flat there.
    rtol, atol = (0.05, 0.03) if name == "solved, not stored" else (1e-5, 1e-5)
    for key, tensor in expected["state_dict"].items():
        torch.testing.assert_close(actual["state_dict"][key], tensor, rtol=rtol, atol=atol)
    expected, actual = (load_checkpoint(results / checkpoint_path(n, name, "best")) for n in (1, 2))
    assert torch.equal(actual["best"]["correct"]["bits"], expected["best"]["correct"]["bits"])


@pytest.mark.parametrize("name", DIFFERENT)
def test_fits_that_depend_on_the_number_of_processes_have_finite_metrics(name: str, results: Path) -> None:
    for values in metrics(results / "2" / "runs" / name / "version_0").values():
        assert all(torch.tensor(values).isfinite())


@pytest.mark.parametrize("name", ["BatchNorm", "average", "low-rank updates, averaged"])
def test_averaged_weights_are_equal_on_all_ranks(name: str, results: Path) -> None:
    first, second = (json.loads((results / "2" / f"{name}-{rank}.json").read_text()) for rank in range(2))
    averages = {key: value for key, value in first.items() if key.startswith(("average/", "val_ema/"))}
    tensor = ".0.up" if name.startswith("low-rank") else "running_mean"
    assert any(key.endswith(tensor) for key in averages) and "val_ema/accuracy" in averages
    assert averages == {key: second[key] for key in averages}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_of_two_processes_equals_that_of_one_on_each_rank(name: str, results: Path) -> None:
    expected = json.loads((results / "1" / f"{name}-0.json").read_text())
    for rank in range(2):
        assert json.loads((results / "2" / f"{name}-{rank}.json").read_text()) == pytest.approx(expected, abs=1e-5)


def read_predictions(path: Path) -> tuple[list[list[str]], list[float]]:
    """The rows without their probabilities, and all probabilities."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return [[row[0], row[1], *row[3::2]] for row in rows], [float(value) for row in rows[1:] for value in row[2::2]]


@pytest.mark.parametrize(("name", "folder"), [*zip(PREDICTED, PREDICTED, strict=True), ("two tasks", "odd")])
def test_each_image_is_predicted_once_in_input_order(name: str, folder: str, results: Path) -> None:
    (rows, probabilities), (rows_of_two, probabilities_of_two) = (
        read_predictions(results / str(n) / f"{name}.csv") for n in (1, 2)
    )
    assert [row[0] for row in rows[1:]] == [f"{folder}/{number}.png" for number in range(PREDICTED[folder])]
    assert rows_of_two == rows and probabilities_of_two == pytest.approx(probabilities, abs=1e-5)


def test_two_processes_write_the_files_of_one(results: Path) -> None:
    one, two = (run_files(results / str(n) / "runs") for n in (1, 2))
    assert two == one
    assert two.count(("live", "version_0", "config.yaml")) == 1
    temporary = [path for n in (1, 2) for path in (results / str(n) / "store").rglob(".*-*")]
    assert not temporary, "temporary files in the feature store"


def run_files(folder: Path) -> list[tuple[str, ...]]:
    """Path components of the files of all runs, without the timestamps of event files."""
    return sorted(
        (*path.relative_to(folder).parts[:-1], path.name.partition(".out.")[0])
        for path in folder.rglob("*")
        if path.is_file()
    )
