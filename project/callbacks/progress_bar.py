"""Progress of a fit and its remaining time: a bar on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from project.evaluation.candidates import STAGES
from project.runtime import lightning_internals
from project.runtime.console import Bar, EtaEstimator, format_duration, is_terminal, print_rank_zero

MAX_LINES = 40  # of a fit with a known number of epochs; longer fits print only every n-th epoch
GROWTH = 1.2  # ratio of the epochs of successive lines, if the number of epochs is unknown
VALIDATED = tuple(f"{stage}/" for stage in STAGES.values())  # prefixes of validation metrics


class FitProgressBar(ProgressBar):
    """One progress bar over all epochs of a fit, with the remaining time of the whole fit.

    Lightning's bar covers a single epoch, and takes a sixth of the time of an epoch on stored rows, because it formats
    all metrics after each batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Bar | None = None
        self._eta = EtaEstimator()  # used without a bar
        self._first_epoch = 0  # after a resume, not 0
        self._validated = 0  # validation batches of the current epoch
        self._next_line = 1  # number of completed epochs

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _show(self, description: str) -> None:
        if self._enabled and self._bar is None and is_terminal():
            self._bar = Bar(description)
            self._bar.start()

    def _hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _count(self, done: int, total: int | None) -> None:
        (self._bar or self._eta).count(done, total)

    # fit

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Sanity check")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_epoch = trainer.current_epoch
        self._eta = EtaEstimator()
        self._validated = 0
        self._show("")
        self._describe_epoch(trainer)
        self._count_batches(trainer, lightning_internals.training_batches(trainer).ready)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now are the training metrics of the previous epoch complete.
        self._print_epoch(trainer, trainer.current_epoch)
        self._validated = 0
        self._describe_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count_batches(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == _epochs(trainer):
            self._hide()  # Lightning now prints why it stops, which would break the bar

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print_epoch(trainer, trainer.current_epoch, ends=True)
        self._hide()

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn != "fit":
            self._count_evaluated(trainer.num_val_batches, *args[3:])
        elif lightning_internals.epochs(trainer).ready:  # not before the first epoch
            self._validated += 1
            self._count_batches(trainer, lightning_internals.training_batches(trainer).ready)

    def _count_batches(self, trainer: pl.Trainer, trained: int) -> None:
        """Count the training and validation batches of all epochs."""
        training, validation = trainer.num_training_batches, _validation_batches(trainer)
        epochs = _epochs(trainer)
        if not self._enabled or epochs is None or not math.isfinite(training):
            return
        per_epoch = int(training) + validation
        validated = self._validated // (trainer.check_val_every_n_epoch or 1)  # averaged over epochs
        self._count(trainer.current_epoch * per_epoch + trained + validated, epochs * per_epoch)

    def _describe_epoch(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            epochs = _epochs(trainer)
            self._bar.describe(f"Epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs else ''}", _metrics(trainer))

    def _print_epoch(self, trainer: pl.Trainer, done: int, ends: bool = False) -> None:
        """Without a bar, print the metrics of an epoch, but not of every epoch of a long fit.

        Args:
            trainer: The trainer.
            done: Number of completed epochs.
            ends: Whether the fit ends here; its last epoch is always printed.
        """
        if not self._enabled or self._bar is not None or is_terminal() or done <= self._first_epoch:
            return
        epochs = _epochs(trainer)
        if not ends and done < self._next_line:
            return
        step = math.ceil(epochs / MAX_LINES) if epochs else max(1, int(done * GROWTH) - done)
        self._next_line = (done // step + 1) * step
        left = f"; {format_duration(self._eta.seconds_left)} left" if epochs and not ends else ""
        # Without a validation in this epoch, its metrics are those of an earlier one.
        metrics = [metric for metric in _metrics(trainer) if self._validated or not metric.startswith(VALIDATED)]
        print_rank_zero(f"Epoch {done}{f'/{epochs}' if epochs else ''}: {', '.join(metrics)}{left}")

    # validate, test, predict

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._show("Validating")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Testing")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Predicting")

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._count_evaluated(trainer.num_test_batches, *args[3:])

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._count_evaluated(trainer.num_predict_batches, *args[3:])

    def _count_evaluated(self, batches: list[int | float], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the batches of all data loaders."""
        total, done = sum(batches), int(sum(batches[:dataloader_idx])) + batch_idx + 1
        self._count(done, int(total) if math.isfinite(total) else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._hide()

    def on_test_end(self, *_: Any, **__: Any) -> None:
        self._hide()

    on_predict_end = on_exception = teardown = on_test_end


def _epochs(trainer: pl.Trainer) -> int | None:
    """Number of epochs from ``max_epochs`` and ``max_steps``; ``None`` if neither is set."""
    bounds = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    batches = trainer.num_training_batches
    if trainer.max_steps >= 0 and 0 < batches < math.inf:
        bounds.append(math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches))
    return min(bounds, default=None)


def _validation_batches(trainer: pl.Trainer) -> int:
    """Number of validation batches per epoch, on average."""
    batches = sum(trainer.num_val_batches) if trainer.enable_validation else 0
    if not math.isfinite(batches):
        return 0
    times = lightning_internals.validations_per_epoch(trainer)
    return int(batches) * times // (trainer.check_val_every_n_epoch or 1)


def _metrics(trainer: pl.Trainer) -> list[str]:
    """The metrics logged with ``prog_bar=True``, as text: accuracies first, validation before training."""
    values = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    order = sorted(values, key=lambda name: (not name.endswith("accuracy"), not name.startswith("val")))
    return [f"{name} {values[name]:.4f}" for name in order]
