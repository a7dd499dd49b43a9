"""Callbacks of each verb."""

from typing import Any

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping

from project.callbacks.feature_cache import FeatureCache
from project.callbacks.graceful_shutdown import GracefulShutdown
from project.cli.transfer_cli import build_callbacks
from project.reporting.dashboard import Dashboard
from project.reporting.run_summary import RunSummary
from project.runtime.signals import SignalHandler


def callback_names(verb: str, **trainer: Any) -> list[str]:
    defaults = {"callbacks": None, "fast_dev_run": False, "logger": None, "enable_checkpointing": None}
    dashboard = Dashboard()
    section = Namespace(
        trainer=Namespace(**{**defaults, "limit_val_batches": None, **trainer}),
        features=FeatureCache(),
        dashboard=dashboard,
        **{"output": "predictions.csv", "coverage": None, "max_error": None, "false_alarms": None},
        **{"ckpt_path": "best.ckpt", "on_bad_image": "record", "output_features": None},
        lr_find=False,
    )
    before = section.clone()
    callbacks = build_callbacks(verb, section, GracefulShutdown(SignalHandler(), ""), RunSummary(dashboard))
    assert section.trainer == before.trainer, "the configuration is unchanged"
    return [type(callback).__name__ for callback in callbacks]


ALL_VERBS = ["FeatureCache", "Dashboard", "GracefulShutdown"]


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, ["RunSummary", "Drift", "LearningRates", "BestCheckpoint", "LastCheckpoint", "ModelCardCallback"]),
        ({"limit_val_batches": 0}, ["RunSummary", "Drift", "LearningRates", "LastCheckpoint", "ModelCardCallback"]),
        ({"logger": False}, ["RunSummary", "Drift", "BestCheckpoint", "LastCheckpoint", "ModelCardCallback"]),
        ({"enable_checkpointing": False}, ["RunSummary", "Drift", "LearningRates"]),
        ({"fast_dev_run": True}, ["RunSummary"]),
    ],
)
def test_fit_callbacks_depend_on_the_trainer_flags(trainer: dict[str, Any], expected: list[str]) -> None:
    assert callback_names("fit", **trainer) == ALL_VERBS + expected


def test_only_predict_has_a_prediction_writer() -> None:
    assert callback_names("validate") == ALL_VERBS
    assert callback_names("predict") == [*ALL_VERBS, "PredictionWriter", "PredictionEngines"]


@pytest.mark.parametrize("user_callbacks", [EarlyStopping("val/loss"), [EarlyStopping("val/loss")]])
def test_user_callbacks_come_first(user_callbacks: Any) -> None:
    assert callback_names("validate", callbacks=user_callbacks) == ["EarlyStopping", *ALL_VERBS]
