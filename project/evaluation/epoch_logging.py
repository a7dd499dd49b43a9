"""Logging of the metrics of an epoch."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from project.runtime import lightning_internals


def log_epoch(module: pl.LightningModule, values: Mapping[str, torch.Tensor]) -> None:
    """Log the metrics of an epoch once; on stored rows, ``log()`` in every step would take a fifth of the epoch.

    Args:
        module: The module of the fit, validation or test.
        values: Scalars by name. They are already reduced over ranks: ``log(sync_dist=True)`` would reduce lazily, on
            first access, and the progress bar reads them on rank zero only, which would deadlock.
    """
    per_class = {name: value for name, value in values.items() if "_of/" in name}
    overall = {name: value for name, value in values.items() if name not in per_class}  # a class may be called loss
    main = {name: value for name, value in overall.items() if name.endswith(("/loss", "/accuracy"))}
    module.log_dict(main, prog_bar=True)
    module.log_dict({name: value for name, value in overall.items() if name not in main})
    if module.trainer.state.fn != "fit":
        module.log_dict(per_class)
    elif per_class:
        _log_directly(module, per_class)


def _log_directly(module: pl.LightningModule, values: Mapping[str, torch.Tensor]) -> None:
    """Log without ``log()``, which for the scores of 100 classes takes twice as long as an epoch on stored rows."""
    trainer = module.trainer
    for metrics in (trainer.callback_metrics, trainer.logged_metrics):
        metrics.update(values)
    if not trainer.sanity_checking:
        step = lightning_internals.logging_step(trainer)  # same step as Lightning's own logging
        numbers = {**{name: float(value) for name, value in values.items()}, "epoch": module.current_epoch}
        for logger in module.loggers:
            logger.log_metrics(numbers, step)
