"""A fit that was killed or interrupted, and then resumed, is the fit that never stopped: to the bit."""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, scalars
from tests.forked import start

EPOCHS = 4
STEPS = 3  # an epoch: 24 images in batches of 8
#: What draws random numbers in each step: a head with dropout.
DROPOUT = ["--model.head", "project.models.heads.MLPHead", "--model.head.dropout", "0.5"]
WORKERS = ["--features.cache", "off", "--data.num_workers", "2", "--data.augment", "standard", "--data.mixup", "0.4"]
SCHEDULED = [
    "--model.scheduler",
    "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "--model.scheduler.patience",
    "0",
    "--model.scheduler.factor",
    "0.3",
]
#: Ways to train, each with all that could tell a resumed fit from one that never stopped.
WAYS = {
    "stored rows": ["--features.engine", "torch"],
    "stored views of a plateau's schedule": ["--data.augment", "standard", "--features.views", "3", *SCHEDULED],
    "live, workers, augmented, mixed": WORKERS,
    "live, a stage of the backbone": [*WORKERS, "--model.trainable", "layer4"],
    "stored, a stage of the backbone": ["--model.trainable", "layer4", "--features.engine", "torch"],
    "batches accumulated": ["--trainer.accumulate_grad_batches", "2", "--features.engine", "torch"],
    "validated within epochs": ["--trainer.val_check_interval", "0.5", "--features.engine", "torch"],
}


def command(photos: Path, weights: Path, *more: str) -> list[str]:
    flags = [*SMALL, *DROPOUT, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "8"]
    flags += ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", str(EPOCHS)]
    return ["fit", *flags, "--seed_everything", "3", "--trainer.accelerator", "cpu", *more]


def left(version: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """The last checkpoint of a run, its curves, and its best checkpoint."""
    checkpoint, best = (
        torch.load(version / f"checkpoints/{word}.ckpt", weights_only=True) for word in ("last", "best")
    )
    events = scalars(version)
    curves = {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.startswith(("features/", "parameters/", "memory/")) and "second" not in name
    }
    return checkpoint, curves, best


def same(one: Any, other: Any, where: str) -> None:
    """Equal to the bit, at any depth."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (each, its) in enumerate(zip(one, other, strict=True)):
            same(each, its, f"{where}.{index}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> Iterator[Any]:
    """What a fit that was left alone has left, of each way."""
    found: dict[tuple[str, int], Any] = {}

    def run(way: str, epochs: int = EPOCHS) -> Any:
        if (way, epochs) not in found:
            folder = tmp_path_factory.mktemp("whole")
            whole = start(folder, [*command(photos, weights, *WAYS[way]), "--trainer.max_epochs", str(epochs)])
            assert whole.wait() == 0, whole.said
            found[way, epochs] = left(folder / "runs/photos/version_0")
        return found[way, epochs]

    yield run


def check_resumed(
    way: str,
    folder: Path,
    photos: Path,
    weights: Path,
    at: dict[str, Any],
    whole: Any,
    code: int,
    epochs: int = EPOCHS,
) -> None:
    flags = [*command(photos, weights, *WAYS[way]), "--trainer.max_epochs", str(epochs)]
    stopped = start(folder, flags, at)
    assert stopped.wait() == code, stopped.said
    resumed = start(folder, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.said
    checkpoint, curves, best = left(folder / "runs/photos/version_1")
    expected, all_curves, _ = whole
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        same(checkpoint[part], expected[part], part)
    assert checkpoint["global_step"] == expected["global_step"]
    same(checkpoint["resume"], expected["resume"], "resume")
    same(checkpoint["loops"], expected["loops"], "loops")
    same(best["state_dict"], whole[2]["state_dict"], "best")
    # Each curve goes on where it was: what there is of it, to its end, is equal.
    for name, points in all_curves.items():
        assert name in curves or not name.startswith(("train/", "val/")), name  # others are drawn when an epoch begins
        there = curves.get(name, [])
        assert there == points[len(points) - len(there) :], name


def steps_of(way: str, epochs: int = EPOCHS) -> int:
    return epochs * (2 if "accumulated" in way else STEPS)


#: Ways for a fit to end early: at which step, in validation or not, by which signal, with which exit code.
ENDS: dict[str, Callable[[str], tuple[dict[str, Any], int]]] = {
    "killed": lambda way: ({"step": random.Random(way).randrange(steps_of(way))}, -signal.SIGKILL),
    "told in a step": lambda way: ({"step": steps_of(way) // 2 - 1, "number": signal.SIGTERM}, 143),
    "told in validation": lambda way: (
        {"step": steps_of(way) // 2, "number": signal.SIGTERM, "validates": True},
        143,
    ),
}
#: Each way with one of the ends, in turn; the others are in the long tests.
PAIRS = [
    pytest.param(way, end, marks=[] if (number - index) % len(ENDS) == 0 else [pytest.mark.long])
    for number, way in enumerate(WAYS)
    for index, end in enumerate(ENDS)
]


@pytest.mark.parametrize(("way", "end"), PAIRS)
def test_however_it_ended_it_is_the_fit_that_never_stopped(
    way: str, end: str, never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    at, code = ENDS[end](way)
    check_resumed(way, tmp_path, photos, weights, at, never_stopped(way), code)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_twenty_random_steps(
    way: str, never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    epochs = 10
    whole = never_stopped(way, epochs)
    for step in random.Random(way).sample(range(steps_of(way, epochs)), 20):
        folder = tmp_path / str(step)
        folder.mkdir()
        check_resumed(way, folder, photos, weights, {"step": step}, whole, -signal.SIGKILL, epochs)


@pytest.mark.parametrize(
    ("way", "step"),
    [("live, workers, augmented, mixed", 9), ("validated within epochs", 7), ("validated within epochs", 8)],
)
def test_told_in_validation_the_epoch_that_is_gone_on_with_has_its_counts(
    way: str, step: int, never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    """They begin anew in the next one, where nobody would see that they were wrong."""
    flags = command(photos, weights, *WAYS[way])
    stopped = start(tmp_path, flags, {"step": step, "number": signal.SIGTERM, "validates": True})
    assert stopped.wait() == 143, stopped.said
    resumed = start(tmp_path, [*flags, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.said
    checkpoint, _, _ = left(tmp_path / "runs/photos/version_1")
    same(checkpoint["loops"], never_stopped(way, 3)[0]["loops"], "loops")


def test_told_twice_in_one_epoch_and_killed_in_the_next(
    never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    way = "stored rows"
    flags = [*command(photos, weights, *WAYS[way]), "--ckpt_path", "last"]
    for at, code in (
        ({"step": 4, "number": signal.SIGTERM}, 143),
        ({"step": 5, "number": signal.SIGINT}, 130),
        ({"step": 8}, -signal.SIGKILL),
        (None, 0),
    ):
        run = start(tmp_path, flags, at)
        assert run.wait() == code, run.said
    checkpoint, _, _ = left(tmp_path / "runs/photos/version_3")
    for part in ("state_dict", "optimizer_states", "loops"):
        same(checkpoint[part], never_stopped(way)[0][part], part)


def test_another_batch_size_is_refused_within_an_epoch(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = command(photos, weights, *WAYS["stored rows"])
    assert start(tmp_path, flags, {"step": 4, "number": signal.SIGTERM}).wait() == 143
    refused = start(tmp_path, [*flags, "--ckpt_path", "last", "--data.batch_size", "4"])
    assert refused.wait() == 2
    assert "there were batches of 8 in 1 processes" in refused.said and "now batches of 4" in refused.said
    assert "Traceback" not in refused.said
