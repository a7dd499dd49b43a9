"""``fit --lr_find``: the rate of a range test, and a fit that is otherwise unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from project.callbacks.learning_rate_finder import LearningRateFinder, RangeTest, suggest
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.trainer import Trainer
from tests.conftest import BACKBONE, COLOURS, SOLVED, STORED, scalars
from tests.integration.test_exact_resume import assert_identical

Fit = Callable[..., int]
STAGES = ["--model.trainable", "layer3", "--model.lr_decay", "0.5", "--model.optimizer", "AdamW"]
#: A head with dropout, images with augmentation and mixing: everything that draws random numbers.
RANDOM = ["--features.cache", "off", "--data.augment", "standard", "--data.mixup", "0.4", "--data.num_workers", "1"]


def run(version: int) -> Path:
    return Path(f"runs/photos/version_{version}")


def last(version: int) -> dict[str, Any]:
    return dict(torch.load(run(version) / "checkpoints/last.ckpt", weights_only=True))


def rate_of(version: int) -> float:
    return float(last(version)["hyper_parameters"]["optimizer"]["init_args"]["lr"])


@pytest.mark.parametrize(
    "flags",
    [
        [*STORED, *STAGES, *SOLVED, "--model.scheduler", "project.models.schedules.WarmupCosine"],
        [*STAGES, *RANDOM, "--model.head", "MLPHead", "--trainer.gradient_clip_val", "1"],
    ],
    ids=["stored rows, solved head", "images, random head"],
)
def test_fit_is_the_one_with_the_found_rate(flags: list[str], fit: Fit) -> None:
    flags = [*flags, "--data.batch_size", "8", "--trainer.max_epochs", "2"]
    assert fit(*flags, "--lr_find") == 0
    assert fit(*flags, "--model.optimizer.lr", str(rate_of(0))) == 0
    found, given = last(0), last(1)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters", "resume", "loops"):
        assert_identical(found[key], given[key], key)
    configs = [yaml.safe_load((run(version) / "config.yaml").read_text()) for version in (0, 1)]
    assert configs[0] == configs[1]
    assert 1e-6 < rate_of(0) < 1
    with Image.open(run(0) / "lr_find.png") as image:
        assert image.width > 300
    assert (run(0) / "lr_find.csv").read_text().startswith("lr,change_of_loss\n")
    assert "lr_find" in scalars(run(0)).Tags()["images"]


def test_resumed_fit_keeps_the_rate(fit: Fit, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}}}
    (here / "c.yaml").write_text(yaml.safe_dump(config))
    assert fit(*STORED, "-c", "c.yaml", "--lr_find") == 0
    assert "instead of 0.5, found in" in capsys.readouterr().out
    assert fit(*STORED, "-c", "c.yaml", "--lr_find", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert f"Learning rate: {rate_of(0):g}, as in the checkpoint" in capsys.readouterr().out
    assert rate_of(1) == rate_of(0) != 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.1"], "which OneCycleLR replaces by max_lr"),
        (["--model.optimizer", "LBFGS"], "--lr_find does not support LBFGS"),
        (["--trainer.max_epochs", "0"], "--lr_find: this fit trains nothing"),
    ],
)
def test_search_without_effect_is_refused(
    flags: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit(*STORED, "--lr_find", *flags))


RATES = np.logspace(-7, 1, 81)


def test_suggestion_is_the_steepest_descent() -> None:
    descent = -1 / (1 + np.exp(-3 * (np.log10(RATES) + 3)))
    rise = np.maximum(np.log10(RATES) + 1, 0) * 5
    rate, reason = suggest(RangeTest(RATES, descent + rise, 1.0))
    assert rate == pytest.approx(1e-3, rel=0.3) and "decreases fastest" in reason


def test_differences_between_batches_after_the_descent_have_no_effect() -> None:
    descent = -1 / (1 + np.exp(-3 * (np.log10(RATES) + 5)))
    noise = np.where(RATES > 1e-3, 0.4 * (np.arange(81) % 3 == 0), 0)
    rate, _ = suggest(RangeTest(RATES, descent + noise, 1.0))
    assert rate == pytest.approx(1e-5, rel=0.3)


def test_suggestion_at_an_optimum_is_a_tenth_of_the_rate_at_which_the_loss_rises() -> None:
    changes = np.where(RATES > 0.0099, 1.0, 0.0) - 1e-4 * np.sin(np.arange(81))
    rate, reason = suggest(RangeTest(RATES, changes, 1.0))
    assert rate == pytest.approx(1e-3, rel=0.3) and "decreases at no rate" in reason


def test_descent_of_a_loss_that_is_zero_already_does_not_count() -> None:
    rates = np.logspace(-7, 1, 100)
    changes = np.where(rates < 0.01, -1e-4, 0.5)
    rate, reason = suggest(RangeTest(rates, changes, 2e-4))
    assert rate == pytest.approx(0.001, rel=0.2) and "it decreases at no rate" in reason


@pytest.mark.filterwarnings("ignore:.*")
def test_own_loaders_are_searched(photos: Path, weights: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ImageClassifier(BACKBONE, str(weights), image_size=32, classes=list(COLOURS))
    data = ImageDataModule(str(photos), num_workers=0)
    data.preprocessing = model.backbone.preprocessing
    loader = data.training_images(slice(24))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[LearningRateFinder()], enable_checkpointing=False, **options)
    trainer.fit(model, loader, loader)
    rate = model.hparams["optimizer"]["init_args"]["lr"]
    assert f"Learning rate: {rate:g} instead of 0.001" in capsys.readouterr().out
