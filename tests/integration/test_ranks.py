"""What two processes make of a run is what one makes of it: the same fit, the same metrics, the same rows."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, draw, scalars
from tests.integration.launched import TORCHRUN, run_all

#: Command lines one after another, as starting a process takes longer than a fit; and the last metrics of each.
RUNS = """
import gc
gc.disable()  # it walks through a million objects of the libraries
import json, os, sys
from pathlib import Path
from project.cli.transfer_cli import TransferCLI
from project.runtime.signals import SignalHandler

for line in json.loads(Path(sys.argv[1]).read_text()):
    name, *arguments = line
    trainer = TransferCLI(arguments, SignalHandler(), "").trainer
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    Path(sys.argv[2], f"{name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(values))
"""

#: Images a batch of all processes, and flags. There are 23 images to train on.
FITS: dict[str, tuple[int, str]] = {
    "one more than whole batches": (22, ""),
    "one more than two": (10, ""),
    "live": (8, "--features.cache off --data.augment flip"),
    "more than there are": (32, ""),
    "weighted and smoothed": (20, "--model.class_weights [1,5,0.2] --model.label_smoothing 0.1"),
    "balanced by drawing": (6, "--data.balance sampler"),
    "accumulated": (4, "--trainer.accumulate_grad_batches 2"),
    "over-fitted": (6, "--trainer.overfit_batches 2"),
    "one validation image": (8, "--data.root few"),
    "mixed": (8, "--features.cache off --data.mixup 0.4 --data.cutmix 1.0"),
    "with BatchNorm": (4, "--model.trainable layer4 --trainer.max_epochs 1"),
}
#: Each process mixes images of its own; each takes statistics of its own part of a batch.
DIFFERENT = ("mixed", "with BatchNorm")
EVALUATIONS = ("validate", "test", "validate --data.root few", "test --data.root few")
PREDICTED = {"odd": 7, "fewer than processes": 1}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Path]:
    """A folder in which ``1`` and ``2`` are what that many processes have made of the same command lines."""
    here = tmp_path_factory.mktemp("ranks")
    for label, (name, counts) in enumerate({"a": (9, 4, 3), "b": (8, 3, 1), "c": (6, 2, 1)}.items()):
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            for number in range(count):
                draw(
                    here / "photos" / split / name / f"{number}.png",
                    (80 + 40 * label, 120, 160),
                    hash_of(name, split, number),
                )
        for number in range(8):
            draw(here / "few/train" / name / f"{number}.png", (80 + 40 * label, 120, 160), hash_of(name, "few", number))
    for split in ("val", "test"):
        draw(here / "few" / split / "b" / "0.png", (120, 120, 160), 5)
    for folder, count in PREDICTED.items():
        for number in range(count):
            draw(here / folder / f"{number}.png", (40 * number, 120, 160), number)
    (here / "runs.py").write_text(RUNS)
    for processes in (1, 2):
        (here / str(processes)).mkdir()
        (here / f"{processes}.json").write_text(json.dumps(list(lines(processes, weights))))
        launch = [*TORCHRUN, "2", "--standalone"] if processes == 2 else []
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(here)
            ((code, said),) = run_all([[*launch, "runs.py", f"{processes}.json", str(processes)]])
        assert code == 0, said
    yield here


def hash_of(name: str, split: str, number: int) -> int:
    return sum(map(ord, name + split)) * 100 + number


def lines(processes: int, weights: Path) -> Iterator[list[str]]:
    """The command lines of each."""
    small = [*SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu"]
    small += ["--trainer.enable_progress_bar", "false", "--features.folder", f"{processes}/store"]
    if processes == 2:
        small += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    fit = ["fit", *small, "--data.root", "photos", "--trainer.max_epochs", "2", "--model.optimizer.lr", "0.05"]
    for name, (batch, flags) in FITS.items():
        size = ["--data.batch_size", str(batch // processes), "--trainer.default_root_dir", f"{processes}/runs"]
        yield [name, *fit, *size, "--name", name, *flags.split()]
    checkpoint = ["--ckpt_path", str(checkpoint_of(processes, "one more than two"))]
    for name in EVALUATIONS:
        verb, *flags = name.split()
        each = ["--data.root", "photos", *flags, "--data.batch_size", str(4 // processes)]
        yield [name.replace("/", " "), verb, *small, *checkpoint, *each]
    for folder in PREDICTED:
        output = ["--output", f"{processes}/{folder}.csv", "--data.batch_size", "2"]
        yield [folder, "predict", *small, *checkpoint, "--data.predict", folder, *output]


def checkpoint_of(processes: int, name: str) -> Path:
    return Path(str(processes), "runs", name, "version_0", "checkpoints", "last.ckpt")


def metrics(run: Path) -> dict[str, list[float]]:
    """Each metric of each epoch."""
    events = scalars(run)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "val/")) and "per_second" not in tag]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("name", [name for name in FITS if name not in DIFFERENT])
def test_a_fit_of_two_processes_is_that_of_one_with_batches_twice_as_large(name: str, both: Path) -> None:
    one, two = (metrics(both / str(n) / "runs" / name / "version_0") for n in (1, 2))
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1", "val/ece"} <= one.keys()
    for tag, values in one.items():
        assert two[tag] == pytest.approx(values, abs=1e-5), tag
    weights, others = (tensors(both / checkpoint_of(n, name)) for n in (1, 2))
    start = torch.load(both / checkpoint_of(1, name), weights_only=True)["global_step"]
    assert start == torch.load(both / checkpoint_of(2, name), weights_only=True)["global_step"]
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_looks_at_a_whole_batch_sees_that_of_its_process(name: str, both: Path) -> None:
    for values in metrics(both / "2" / "runs" / name / "version_0").values():
        assert all(torch.tensor(values).isfinite())


@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_image_is_counted_twice(name: str, both: Path) -> None:
    name = name.replace("/", " ")
    one = json.loads((both / "1" / f"{name}-0.json").read_text())
    for rank in range(2):  # and all processes know the same
        assert json.loads((both / "2" / f"{name}-{rank}.json").read_text()) == pytest.approx(one, abs=1e-5)


def predictions(path: Path) -> tuple[list[list[str]], list[float]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return [[row[0], row[1], *row[3::2]] for row in rows], [float(value) for row in rows[1:] for value in row[2::2]]


@pytest.mark.parametrize("folder", PREDICTED)
def test_each_image_is_predicted_once_in_the_order_of_the_input(folder: str, both: Path) -> None:
    (one, probabilities), (two, others) = (predictions(both / str(n) / f"{folder}.csv") for n in (1, 2))
    assert [row[0] for row in one[1:]] == [f"{folder}/{number}.png" for number in range(PREDICTED[folder])]
    assert two == one and others == pytest.approx(probabilities, abs=1e-5)


def test_there_is_one_of_each_file(both: Path) -> None:
    one, two = (files(both / str(n) / "runs") for n in (1, 2))
    assert two == one
    assert [*two].count(("live", "version_0", "config.yaml")) == 1
    store = [len(list((both / str(n) / "store").rglob(".*-*"))) for n in (1, 2)]
    assert store == [0, 0], "nothing temporary is left"


def files(folder: Path) -> list[tuple[Any, ...]]:
    """The files of all runs; of events, without the time in their names."""
    return sorted(
        (*path.relative_to(folder).parts[:-1], path.name.partition(".out.")[0])
        for path in folder.rglob("*")
        if path.is_file()
    )
