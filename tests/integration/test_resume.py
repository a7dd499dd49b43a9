"""A fit that was killed or interrupted, and then resumed, is the fit that never stopped: to the bit."""

import random
import signal
from collections.abc import Iterator
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


def left(version: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, float]]]]:
    """The last checkpoint of a run, and its curves."""
    checkpoint = torch.load(version / "checkpoints/last.ckpt", weights_only=True)
    events = scalars(version)
    curves = {
        name: [(each.step, each.value) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.startswith(("features/", "parameters/", "memory/")) and "second" not in name
    }
    return checkpoint, curves


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
    found: dict[str, Any] = {}

    def run(way: str) -> Any:
        if way not in found:
            folder = tmp_path_factory.mktemp("whole")
            whole = start(folder, command(photos, weights, *WAYS[way]))
            assert whole.wait() == 0, whole.said
            found[way] = left(folder / "runs/photos/version_0")
        return found[way]

    yield run


def check_resumed(
    way: str, folder: Path, photos: Path, weights: Path, at: dict[str, Any], whole: Any, code: int
) -> None:
    flags = command(photos, weights, *WAYS[way])
    stopped = start(folder, flags, at)
    assert stopped.wait() == code, stopped.said
    resumed = start(folder, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.said
    checkpoint, curves = left(folder / "runs/photos/version_1")
    expected, all_curves = whole
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        same(checkpoint[part], expected[part], part)
    assert checkpoint["global_step"] == expected["global_step"]
    same(checkpoint["resume"], expected["resume"], "resume")
    # Each curve goes on where it was: what there is of it, to its end, is equal.
    for name, points in all_curves.items():
        assert name in curves, name
        assert curves[name] == points[len(points) - len(curves[name]) :], name
    first, second = (
        torch.load(v / "checkpoints/best.ckpt", weights_only=True)
        for v in (folder / "runs/photos/version_1", folder / "runs/photos/version_1")
    )
    same(first["state_dict"], second["state_dict"], "best")


@pytest.mark.parametrize("way", WAYS)
def test_after_a_kill_it_is_the_fit_that_never_stopped(
    way: str, never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    step = random.Random(way).randrange(STEPS * EPOCHS // (2 if "accumulated" in way else 1))
    check_resumed(way, tmp_path, photos, weights, {"step": step}, never_stopped(way), -signal.SIGKILL)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("validates", [False, True], ids=["in a step", "in validation"])
def test_after_a_signal_it_is_the_fit_that_never_stopped(
    way: str, validates: bool, never_stopped: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    steps = STEPS * (2 if validates else 1) + (0 if validates else 1)
    at = {"step": steps, "number": signal.SIGTERM, "validates": validates}
    if "accumulated" in way:
        at["step"] = 4 if validates else 3
    check_resumed(way, tmp_path, photos, weights, at, never_stopped(way), 143)
