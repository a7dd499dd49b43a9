"""Which callbacks a verb has."""

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


def names(verb: str, **trainer: Any) -> list[str]:
    defaults = {"callbacks": None, "fast_dev_run": False, "logger": None, "enable_checkpointing": None}
    dashboard = Dashboard()
    section = Namespace(
        trainer=Namespace(**{**defaults, "limit_val_batches": None, **trainer}),
        features=FeatureCache(),
        dashboard=dashboard,
        output="predictions.csv",
    )
    before = section.clone()
    callbacks = build_callbacks(verb, section, GracefulShutdown(SignalHandler(), ""), RunSummary(dashboard))
    assert section.trainer == before.trainer, "the configuration is left alone"
    return [type(each).__name__ for each in callbacks]


ALWAYS = ["FeatureCache", "Dashboard", "GracefulShutdown"]


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, ["RunSummary", "LearningRateMonitor", "BestCheckpoint", "LastCheckpoint", "ModelCardCallback"]),
        ({"limit_val_batches": 0}, ["RunSummary", "LearningRateMonitor", "LastCheckpoint", "ModelCardCallback"]),
        ({"logger": False}, ["RunSummary", "BestCheckpoint", "LastCheckpoint", "ModelCardCallback"]),
        ({"enable_checkpointing": False}, ["RunSummary", "LearningRateMonitor"]),
        ({"fast_dev_run": True}, ["RunSummary"]),
    ],
)
def test_a_fit_has_what_its_options_allow(trainer: dict[str, Any], expected: list[str]) -> None:
    assert names("fit", **trainer) == ALWAYS + expected


def test_other_verbs_report_nothing_and_predict_writes_a_file() -> None:
    assert names("validate") == ALWAYS
    assert names("predict") == [*ALWAYS, "PredictionWriter"]


@pytest.mark.parametrize("given", [EarlyStopping("val/loss"), [EarlyStopping("val/loss")]])
def test_the_users_own_come_first(given: Any) -> None:
    assert names("validate", callbacks=given) == ["EarlyStopping", *ALWAYS]
