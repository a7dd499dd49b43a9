"""Learning-rate schedules: how often they are stepped, how long they are, and what they watch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import scalars

Fit = Callable[..., int]
ADAM = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--data.batch_size", "8"]  # 3 steps an epoch
CYCLE = ["--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.1"]
COSINE = ["--model.scheduler", "CosineAnnealingLR"]
PLATEAU = ["--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.scheduler.patience", "0"]


def state(version: int = 0) -> dict[str, Any]:
    """The schedule's state at the end of a fit."""
    path = Path(f"runs/photos/version_{version}/checkpoints/last.ckpt")
    (found,) = torch.load(path, weights_only=True)["lr_schedulers"]
    return dict(found)


def last_rate(version: int = 0) -> float:
    return float(state(version)["_last_lr"][0])


def test_one_cycle_goes_over_the_steps_of_the_fit(fit: Fit) -> None:
    assert fit(*ADAM, *CYCLE, "--trainer.max_epochs", "3") == 0
    assert (state()["total_steps"], state()["last_epoch"]) == (9, 9)


def test_a_cosine_goes_over_the_epochs_of_the_fit(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--trainer.max_epochs", "4") == 0
    assert (state()["T_max"], state()["last_epoch"]) == (4, 4)
    assert last_rate() == pytest.approx(0, abs=1e-9)
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-AdamW/head")]
    assert rates == pytest.approx([0.01, 0.00853553, 0.005, 0.00146447], rel=1e-4)


def test_any_schedule_is_stepped_each_step_where_that_is_asked_for(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--model.scheduler_interval", "step", "--trainer.max_epochs", "2") == 0
    assert (state()["T_max"], state()["last_epoch"]) == (6, 6)
    assert fit(*ADAM, *CYCLE, "--model.scheduler_interval", "epoch", "--trainer.max_epochs", "2") == 0
    assert (state(1)["total_steps"], state(1)["last_epoch"]) == (2, 2)


def test_a_length_that_is_given_is_kept(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--model.scheduler.T_max", "7", "--trainer.max_epochs", "2") == 0
    assert state()["T_max"] == 7


@pytest.mark.parametrize("steps", [3, 10])
def test_a_cycle_of_another_length_is_refused_before_training(
    steps: int, fit: Fit, refused: Callable[[int], str]
) -> None:
    said = refused(fit(*ADAM, *CYCLE, "--model.scheduler.total_steps", str(steps), "--trainer.max_epochs", "3"))
    assert f"OneCycleLR has total_steps {steps}, and the fit has 9 steps." in said
    assert not list(Path("runs").rglob("*.ckpt"))


def test_a_length_that_nothing_gives_is_asked_for(fit: Fit, refused: Callable[[int], str]) -> None:
    flags = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:05"]
    assert "CosineAnnealingLR needs T_max, as the fit's length is not known" in refused(fit(*ADAM, *COSINE, *flags))


def test_a_resumed_fit_with_more_epochs_has_the_schedule_of_the_longer_one(fit: Fit) -> None:
    for more, version in ((CYCLE, 0), (COSINE, 2)):
        assert fit(*ADAM, *more, "--trainer.max_epochs", "2") == 0
        last = f"runs/photos/version_{version}/checkpoints/last.ckpt"
        assert fit("--data.batch_size", "8", "--ckpt_path", last, "--trainer.max_epochs", "4") == 0
    assert (state(1)["total_steps"], state(1)["last_epoch"]) == (12, 12)
    assert (state(3)["T_max"], state(3)["last_epoch"]) == (4, 4) and last_rate(3) == pytest.approx(0, abs=1e-9)


def test_a_plateau_is_counted_in_validations(fit: Fit) -> None:
    # A threshold that nothing passes: each validation after the first is one more without an improvement.
    plateau = [*PLATEAU, "--model.scheduler.threshold", "0.999", "--model.scheduler.factor", "0.5"]
    assert fit(*ADAM, *plateau, "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "6") == 0
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-AdamW/head")]
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 2)


def test_a_plateau_without_a_validation_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    said = refused(fit(*ADAM, *PLATEAU, "--trainer.limit_val_batches", "0"))
    assert "ReduceLROnPlateau watches val/loss, and this fit has no validation" in said


def test_a_wrong_metric_gets_the_right_one(fit: Fit, refused: Callable[[int], str]) -> None:
    plateau = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "val/los"]
    said = refused(fit(*ADAM, *plateau))
    assert "there is no 'val/los' to watch. Did you mean 'val/loss'" in said


def test_steps_that_end_a_fit_are_its_length(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--trainer.max_steps", "6", "--trainer.max_epochs", "100") == 0
    assert state()["T_max"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*COSINE, "--model.scheduler.T_max", "0"], "CosineAnnealingLR needs a T_max of at least 1, not 0"),
        (
            [*CYCLE, "--model.scheduler.epochs", "2", "--model.scheduler.steps_per_epoch", "1"],
            "OneCycleLR has total_steps 2, and the fit has 3 steps",
        ),
        (["--model.scheduler", "StepLR", "--model.scheduler.step_size", "0"], "StepLR cannot be stepped"),
        ([*PLATEAU, "--trainer.check_val_every_n_epoch", "null"], "needs a validation at the end of an epoch"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_before_training(
    flags: list[str], words: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert words in refused(fit(*ADAM, *flags))


def test_a_plateau_of_the_training_needs_no_validation(fit: Fit) -> None:
    watched = [
        "--model.scheduler",
        "lightning.pytorch.cli.ReduceLROnPlateau",
        "--model.scheduler.monitor",
        "train/loss",
    ]
    assert fit(*ADAM, *watched, "--trainer.limit_val_batches", "0") == 0


def test_an_older_checkpoint_steps_its_schedule_once_an_epoch(fit: Fit) -> None:
    cyclic = ["--model.scheduler", "CyclicLR", "--model.scheduler.base_lr", "0.001", "--model.scheduler.max_lr", "0.1"]
    flags = [*cyclic, "--model.scheduler.cycle_momentum", "false", "--model.scheduler_interval", "epoch"]
    assert fit(*ADAM, *flags, "--trainer.max_epochs", "2") == 0
    checkpoint = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]["scheduler_interval"], checkpoint["transfer"]["schedule"]
    torch.save(checkpoint, "old.ckpt")
    assert fit("--data.batch_size", "8", "--ckpt_path", "old.ckpt", "--trainer.max_epochs", "4") == 0
    assert state(1)["last_epoch"] == 4


def test_a_score_is_there_in_each_epoch(fit: Fit) -> None:
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/precision_of/red"]
    stopping += ["--trainer.callbacks.mode=max"]
    assert fit("--model.optimizer.lr", "5", *stopping, "--trainer.max_epochs", "4") == 0
