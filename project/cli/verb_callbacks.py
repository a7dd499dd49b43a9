"""The callbacks of each verb."""

from __future__ import annotations

import lightning.pytorch as pl
from jsonargparse import Namespace

from project.callbacks.drift import Drift
from project.callbacks.graceful_shutdown import GracefulShutdown
from project.callbacks.learning_rate_finder import LearningRateFinder
from project.callbacks.learning_rates import LearningRates
from project.callbacks.model_checkpoint import BestCheckpoint, LastCheckpoint
from project.callbacks.prediction_columns import AnswerLimits
from project.callbacks.prediction_engines import PredictionEngines
from project.callbacks.prediction_writer import PredictionWriter
from project.reporting.model_card_callback import ModelCardCallback
from project.reporting.run_summary import RunSummary


def build_callbacks(verb: str, section: Namespace, shutdown: GracefulShutdown, report: RunSummary) -> list[pl.Callback]:
    """Callbacks of a verb in Lightning's calling order, starting with the user's.

    Args:
        verb: Name of the verb.
        section: Its configuration, with instantiated classes.
        shutdown: Stops a fit after a signal.
        report: Prints the summary of a fit.
    """
    trainer, user_callbacks = section.trainer, section.trainer.callbacks or []
    callbacks: list[pl.Callback] = [*(user_callbacks if isinstance(user_callbacks, list) else [user_callbacks])]
    callbacks += [section.features, section.dashboard, shutdown]
    if verb == "predict":
        writer = _prediction_writer(section)
        callbacks += [writer, PredictionEngines(section.features.provider, writer, section.features.is_enabled)]
    if verb != "fit":
        return callbacks
    callbacks.append(report)
    if section.lr_find:
        callbacks.append(LearningRateFinder())
    if not trainer.fast_dev_run:
        callbacks.append(Drift())
        if trainer.logger is not False:
            callbacks.append(LearningRates())
        if trainer.enable_checkpointing is not False:
            callbacks += [
                *([BestCheckpoint()] if trainer.limit_val_batches != 0 else []),
                LastCheckpoint(),
                ModelCardCallback(),
            ]
    return callbacks


def _prediction_writer(section: Namespace) -> PredictionWriter:
    given, provider = section.ckpt_path, section.features.provider
    return PredictionWriter(
        section.output,
        AnswerLimits(section.coverage, section.max_error, section.false_alarms),
        given if isinstance(given, list) else [str(given)],
        section.on_bad_image,
        section.output_features,
        {"engine": provider.engine, "engine precision": provider.precision or "auto"},
    )
