"""Learning-rate schedulers: interval, length and monitored metric."""

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
    """The scheduler's state at the end of a fit."""
    path = Path(f"runs/photos/version_{version}/checkpoints/last.ckpt")
    (scheduler,) = torch.load(path, weights_only=True)["lr_schedulers"]
    return dict(scheduler)


def last_rate(version: int = 0) -> float:
    return float(state(version)["_last_lr"][0])


def test_one_cycle_spans_the_steps_of_the_fit(fit: Fit) -> None:
    assert fit(*ADAM, *CYCLE, "--trainer.max_epochs", "3") == 0
    assert (state()["total_steps"], state()["last_epoch"]) == (9, 9)


def test_cosine_spans_the_epochs_of_the_fit(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--trainer.max_epochs", "4") == 0
    assert (state()["T_max"], state()["last_epoch"]) == (4, 4)
    assert last_rate() == pytest.approx(0, abs=1e-9)
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-AdamW/head")]
    assert rates == pytest.approx([0.01, 0.00853553, 0.005, 0.00146447], rel=1e-4)


def test_scheduler_interval_overrides_the_default(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--model.scheduler_interval", "step", "--trainer.max_epochs", "2") == 0
    assert (state()["T_max"], state()["last_epoch"]) == (6, 6)
    assert fit(*ADAM, *CYCLE, "--model.scheduler_interval", "epoch", "--trainer.max_epochs", "2") == 0
    assert (state(1)["total_steps"], state(1)["last_epoch"]) == (2, 2)


def test_given_length_is_kept(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--model.scheduler.T_max", "7", "--trainer.max_epochs", "2") == 0
    assert state()["T_max"] == 7


@pytest.mark.parametrize("steps", [3, 10])
def test_one_cycle_of_another_length_is_refused_before_training(
    steps: int, fit: Fit, refused: Callable[[int], str]
) -> None:
    message = refused(fit(*ADAM, *CYCLE, "--model.scheduler.total_steps", str(steps), "--trainer.max_epochs", "3"))
    assert f"OneCycleLR has total_steps {steps}, but the fit has 9 steps." in message
    assert not list(Path("runs").rglob("*.ckpt"))


def test_unknown_length_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    flags = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:05"]
    assert "CosineAnnealingLR needs T_max, because the length of the fit is unknown" in refused(
        fit(*ADAM, *COSINE, *flags)
    )


def test_resume_with_more_epochs_extends_the_schedule(fit: Fit) -> None:
    for more, version in ((CYCLE, 0), (COSINE, 2)):
        assert fit(*ADAM, *more, "--trainer.max_epochs", "2") == 0
        last = f"runs/photos/version_{version}/checkpoints/last.ckpt"
        assert fit("--data.batch_size", "8", "--ckpt_path", last, "--trainer.max_epochs", "4") == 0
    assert (state(1)["total_steps"], state(1)["last_epoch"]) == (12, 12)
    assert (state(3)["T_max"], state(3)["last_epoch"]) == (4, 4) and last_rate(3) == pytest.approx(0, abs=1e-9)


def test_plateau_scheduler_counts_validations(fit: Fit) -> None:
    # No change exceeds the threshold, so each validation after the first counts as one without improvement.
    plateau = [*PLATEAU, "--model.scheduler.threshold", "0.999", "--model.scheduler.factor", "0.5"]
    assert fit(*ADAM, *plateau, "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "6") == 0
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-AdamW/head")]
    assert rates == pytest.approx([0.01] * 4 + [0.005] * 2)


def test_plateau_scheduler_without_validation_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    message = refused(fit(*ADAM, *PLATEAU, "--trainer.limit_val_batches", "0"))
    assert "ReduceLROnPlateau monitors val/loss, but this fit has no validation" in message


def test_misspelt_metric_gets_a_suggestion(fit: Fit, refused: Callable[[int], str]) -> None:
    plateau = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "val/los"]
    message = refused(fit(*ADAM, *plateau))
    assert "metric 'val/los' is not logged. Did you mean 'val/loss'" in message


def test_max_steps_limits_the_schedule(fit: Fit) -> None:
    assert fit(*ADAM, *COSINE, "--trainer.max_steps", "6", "--trainer.max_epochs", "100") == 0
    assert state()["T_max"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*COSINE, "--model.scheduler.T_max", "0"], "T_max of CosineAnnealingLR must be at least 1, not 0"),
        (
            [*CYCLE, "--model.scheduler.epochs", "2", "--model.scheduler.steps_per_epoch", "1"],
            "OneCycleLR has total_steps 2, but the fit has 3 steps",
        ),
        (["--model.scheduler", "StepLR", "--model.scheduler.step_size", "0"], "StepLR cannot be stepped"),
        ([*PLATEAU, "--trainer.check_val_every_n_epoch", "null"], "requires validation at the end of epochs"),
    ],
)
def test_invalid_scheduler_is_refused_before_training(
    flags: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit(*ADAM, *flags))


def test_plateau_scheduler_on_a_training_metric_needs_no_validation(fit: Fit) -> None:
    monitor = [
        "--model.scheduler",
        "lightning.pytorch.cli.ReduceLROnPlateau",
        "--model.scheduler.monitor",
        "train/loss",
    ]
    assert fit(*ADAM, *monitor, "--trainer.limit_val_batches", "0") == 0


def test_scheduler_of_an_earlier_checkpoint_is_stepped_once_per_epoch(fit: Fit) -> None:
    cyclic = ["--model.scheduler", "CyclicLR", "--model.scheduler.base_lr", "0.001", "--model.scheduler.max_lr", "0.1"]
    flags = [*cyclic, "--model.scheduler.cycle_momentum", "false", "--model.scheduler_interval", "epoch"]
    assert fit(*ADAM, *flags, "--trainer.max_epochs", "2") == 0
    checkpoint = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    del checkpoint["hyper_parameters"]["scheduler_interval"], checkpoint["transfer"]["schedule"]
    torch.save(checkpoint, "old.ckpt")
    assert fit("--data.batch_size", "8", "--ckpt_path", "old.ckpt", "--trainer.max_epochs", "4") == 0
    assert state(1)["last_epoch"] == 4


def test_per_class_precision_can_be_monitored_in_every_epoch(fit: Fit) -> None:
    early_stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/precision_of/red"]
    early_stopping += ["--trainer.callbacks.mode=max"]
    assert fit("--model.optimizer.lr", "5", *early_stopping, "--trainer.max_epochs", "4") == 0


@pytest.mark.parametrize(("scheduler", "steps"), [(COSINE, 2), (CYCLE, 6)], ids=["cosine", "one cycle"])
def test_fit_of_no_epochs_needs_no_length_and_can_be_resumed(scheduler: list[str], steps: int, fit: Fit) -> None:
    assert fit(*ADAM, *scheduler, "--trainer.max_epochs", "0") == 0
    assert fit("--data.batch_size", "8", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert (state(1)["last_epoch"], state(1).get("T_max", state(1).get("total_steps"))) == (steps, steps)
