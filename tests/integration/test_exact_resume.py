"""A killed or interrupted fit that is resumed is bit-identical to an uninterrupted one."""

import functools
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL, scalars
from tests.forked import start

EPOCHS = 4
STEPS = 3  # per epoch: 24 images in batches of 8
#: A head that draws random numbers in each step.
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
#: Training setups, by name: their flags.
SETUPS = {
    "stored rows": ["--features.engine", "torch"],
    "stored views, plateau schedule": ["--data.augment", "standard", "--features.views", "3", *SCHEDULED],
    "images, workers, augmented, mixed": WORKERS,
    "images, partly frozen": [*WORKERS, "--model.trainable", "layer4", "--model.batch_norm", "train"],
    "stored maps, partly frozen": ["--model.trainable", "layer4", "--features.engine", "torch"],
    "accumulated gradients": ["--trainer.accumulate_grad_batches", "2", "--features.engine", "torch"],
    "accumulated gradients, stages by depth, warm-up": [
        *("--model.trainable", "layer3", "--model.lr_decay", "0.5", "--model.optimizer.weight_decay", "0.1"),
        *("--model.scheduler", "project.models.schedules.WarmupCosine", "--model.scheduler_frequency", "3"),
        *("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5", "--features.engine", "torch"),
    ],
    "averaged weights, partly frozen, accumulated gradients": [
        *("--model.trainable", "layer4", "--model.ema", "0.9", "--model.l2_sp", "0.01"),
        *("--trainer.accumulate_grad_batches", "2", "--features.engine", "torch"),
    ],
    "validations within epochs": ["--trainer.val_check_interval", "0.5", "--features.engine", "torch"],
    "validations within epochs, plateau schedule": [
        *("--trainer.val_check_interval", "0.5", "--features.engine", "torch"),
        *SCHEDULED,
    ],
    "images, norm adapter": [*WORKERS, "--model.trainable", "all", "--model.adapter", "norm"],
    "stored maps, low-rank updates, averaged and interpolated": [
        *("--model.trainable", "layer3", "--model.adapter", "lora", "--features.engine", "torch"),
        *("--model.ema", "0.9", "--model.interpolate", "auto", "--model.lr_decay", "0.5"),
    ],
    "three cuts": [*("--model.schedule", "{0: head, 1: layer4, 2: layer3}"), "--features.engine", "torch"],
    "three cuts, averaged weights, BatchNorm, L2-SP, rates by depth": [
        *("--model.schedule", "{0: head, 1: layer4, 2: layer3}", "--model.ema", "0.9", "--features.engine", "torch"),
        *("--model.batch_norm", "train", "--model.l2_sp", "0.01", "--model.lr_decay", "0.5"),
    ],
    "three cuts by val/loss": [
        *("--model.schedule", "[head, layer4, layer3]", "--model.schedule_patience", "1"),
        *("--trainer.val_check_interval", "0.5", "--features.cache", "off", "--model.schedule_warmup", "1.5"),
    ],
}


def command(photos: Path, weights: Path, *more: str) -> list[str]:
    flags = [*SMALL, *DROPOUT, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "8"]
    flags += ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", str(EPOCHS)]
    return ["fit", *flags, "--seed_everything", "3", "--trainer.accelerator", "cpu", *more]


def results(version: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """The last checkpoint of a run, its logged curves, and its best checkpoint."""
    last, best = (torch.load(version / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "best"))
    events = scalars(version)
    curves = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.startswith(("features/", "parameters/", "memory/")) and "second" not in name
    }
    return last, curves, best


def assert_identical(actual: Any, expected: Any, key: str) -> None:
    """Compare nested values; tensors have to be bit-identical."""
    if isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected), key
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys(), key
        for name in actual:
            assert_identical(actual[name], expected[name], f"{key}.{name}")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), key
        for index, (actual_item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(actual_item, expected_item, f"{key}.{index}")
    else:
        assert actual == expected, key


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> Callable[..., Any]:
    """Results of an uninterrupted fit of a setup; each fit runs once."""

    @functools.cache
    def run(setup: str, epochs: int = EPOCHS) -> Any:
        folder = tmp_path_factory.mktemp("uninterrupted")
        fit = start(folder, [*command(photos, weights, *SETUPS[setup]), "--trainer.max_epochs", str(epochs)])
        assert fit.wait() == 0, fit.output
        return results(folder / "runs/photos/version_0")

    return run


def check_resumed(
    setup: str,
    folder: Path,
    photos: Path,
    weights: Path,
    at: dict[str, Any],
    expected: Any,
    code: int,
    epochs: int = EPOCHS,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Interrupt a fit, resume it, and compare it with the results of an uninterrupted one.

    Args:
        setup: Key of ``SETUPS``.
        folder: Working directory.
        photos: The images.
        weights: The backbone's weights.
        at: Where the fit sends itself a signal; see :func:`tests.forked.start`.
        expected: Results of the uninterrupted fit.
        code: Expected exit code of the interrupted fit.
        epochs: Number of epochs.
        environment: Additional environment variables.
    """
    flags = [*command(photos, weights, *SETUPS[setup]), "--trainer.max_epochs", str(epochs)]
    stopped = start(folder, flags, at, environment)
    assert stopped.wait() == code, stopped.output
    resumed = start(folder, [*flags, "--ckpt_path", "last"], environment=environment)
    assert resumed.wait() == 0, resumed.output
    last, curves, best = results(folder / "runs/photos/version_1")
    expected_last, expected_curves, expected_best = expected
    keys = ("state_dict", "average", "optimizer_states", "lr_schedulers", "global_step", "resume", "loops")
    for key in (*keys, "unfreezing"):
        assert_identical(last.get(key), expected_last.get(key), key)
    for key in ("state_dict", "average"):
        assert_identical(best.get(key), expected_best.get(key), f"best: {key}")
    for name, expected_points in expected_curves.items():
        # Other curves are logged only at the start of an epoch.
        assert name in curves or not name.startswith(("train/", "val/")), name
        points = curves.get(name, [])
        assert points == expected_points[len(expected_points) - len(points) :], name


def total_steps(setup: str, epochs: int = EPOCHS) -> int:
    return epochs * (2 if "accumulated" in setup else STEPS)


#: Interruptions of a fit: where it sends itself which signal, and its exit code.
INTERRUPTIONS: dict[str, Callable[[str], tuple[dict[str, Any], int]]] = {
    "kill": lambda setup: ({"step": random.Random(setup).randrange(total_steps(setup))}, -signal.SIGKILL),
    "SIGTERM in training": lambda setup: ({"step": total_steps(setup) // 2 - 1, "number": signal.SIGTERM}, 143),
    "SIGTERM in validation": lambda setup: (
        {"step": total_steps(setup) // 2, "number": signal.SIGTERM, "validates": True},
        143,
    ),
}
#: Each setup with one of the interruptions in turn; the others are long tests.
PAIRS = [
    pytest.param(setup, name, marks=[] if (number - index) % len(INTERRUPTIONS) == 0 else [pytest.mark.long])
    for number, setup in enumerate(SETUPS)
    for index, name in enumerate(INTERRUPTIONS)
]


@pytest.mark.parametrize(("setup", "interruption"), PAIRS)
def test_resumed_fit_is_bit_identical_to_an_uninterrupted_one(
    setup: str, interruption: str, uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    at, code = INTERRUPTIONS[interruption](setup)
    check_resumed(setup, tmp_path, photos, weights, at, uninterrupted(setup), code)


@pytest.mark.parametrize(
    "at",
    # Before the cut moves, while rows at the new cut are computed, in the first step after it, and in the last cut.
    [{"step": 2}, {"reads": 90}, {"step": 3}, {"step": 8}],
    ids=str,
)
def test_resume_after_a_kill_around_a_moving_cut(
    at: dict[str, Any], uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    setup = "three cuts"
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # rows are computed, not reused
    check_resumed(setup, tmp_path, photos, weights, at, uninterrupted(setup), -signal.SIGKILL, environment=environment)


def test_resume_after_a_stop_between_a_moved_cut_and_its_first_step(
    uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    """The signal comes while rows at the new cut are computed. No step has averaged the weights of the new stage."""
    setup, environment = (
        "three cuts, averaged weights, BatchNorm, L2-SP, rates by depth",
        {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    at = {"reads": 90, "number": signal.SIGTERM}
    check_resumed(setup, tmp_path, photos, weights, at, uninterrupted(setup), 143, environment=environment)


@pytest.mark.long
@pytest.mark.parametrize("setup", SETUPS)
def test_resume_after_a_kill_at_twenty_random_steps(
    setup: str, uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    epochs = 10
    expected = uninterrupted(setup, epochs)
    for step in random.Random(setup).sample(range(total_steps(setup, epochs)), 20):
        folder = tmp_path / str(step)
        folder.mkdir()
        check_resumed(setup, folder, photos, weights, {"step": step}, expected, -signal.SIGKILL, epochs)


@pytest.mark.parametrize(
    ("setup", "step"),
    [("images, workers, augmented, mixed", 9), ("validations within epochs", 7), ("validations within epochs", 8)],
)
def test_loop_counts_of_an_epoch_interrupted_in_validation_are_exact(
    setup: str, step: int, uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    """The fit ends with the resumed epoch, because the next epoch resets the counts and would hide an error."""
    flags = command(photos, weights, *SETUPS[setup])
    stopped = start(tmp_path, flags, {"step": step, "number": signal.SIGTERM, "validates": True})
    assert stopped.wait() == 143, stopped.output
    resumed = start(tmp_path, [*flags, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.output
    last, _, _ = results(tmp_path / "runs/photos/version_1")
    assert_identical(last["loops"], uninterrupted(setup, 3)[0]["loops"], "loops")


def test_resume_after_two_signals_in_one_epoch_and_a_kill_in_the_next(
    uninterrupted: Any, tmp_path: Path, photos: Path, weights: Path
) -> None:
    flags = [*command(photos, weights, *SETUPS["stored rows"]), "--ckpt_path", "last"]
    for at, code in (
        ({"step": 4, "number": signal.SIGTERM}, 143),
        ({"step": 5, "number": signal.SIGINT}, 130),
        ({"step": 8}, -signal.SIGKILL),
        (None, 0),
    ):
        run = start(tmp_path, flags, at)
        assert run.wait() == code, run.output
    last, _, _ = results(tmp_path / "runs/photos/version_3")
    for key in ("state_dict", "optimizer_states", "loops"):
        assert_identical(last[key], uninterrupted("stored rows")[0][key], key)


def test_changed_batch_size_is_refused_within_an_epoch(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = command(photos, weights, *SETUPS["stored rows"])
    assert start(tmp_path, flags, {"step": 4, "number": signal.SIGTERM}).wait() == 143
    refused = start(tmp_path, [*flags, "--ckpt_path", "last", "--data.batch_size", "4"])
    assert refused.wait() == 2
    assert "within an epoch with data.batch_size 8, world size 1" in refused.output
    assert "this fit has data.batch_size 4" in refused.output
    assert "Traceback" not in refused.output
