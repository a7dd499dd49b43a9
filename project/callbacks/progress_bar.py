"""How far a fit is, and how long it still takes: a bar on a terminal, a line of some epochs elsewhere."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from project.runtime import lightning_internals
from project.runtime.console import Bar, Pace, clock, on_a_terminal, print_rank_zero

MOST_LINES = 40  # of a fit, whatever its number of epochs
GROWTH = 1.2  # of the number of epochs from one line to the next, where nobody knows how many there will be


class Progress(ProgressBar):
    """One bar over all epochs of a fit, with the time that is left of the whole.

    Lightning's own counts the batches of an epoch, and takes a sixth of the time of one over stored rows: it looks up
    and formats all metrics with every batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Bar | None = None
        self._pace = Pace()
        self._first = 0  # epoch of this fit
        self._validated = 0  # batches of this epoch
        self._next_line = 1

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _show(self, what: str) -> None:
        if self._enabled and self._bar is None and on_a_terminal():
            self._bar = Bar(what)
            self._bar.start()

    def _hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _count(self, done: int, total: int | None) -> None:
        (self._bar or self._pace).count(done, total)

    # --- a fit

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Trying a batch of validation")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.current_epoch
        self._pace = Pace()
        self._validated = 0
        self._show("")
        self._name_epoch(trainer)
        self._count_batches(trainer, lightning_internals.training_batches(trainer).ready)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of the epoch before: what its training came to was not known yet when it ended.
        self._say_epoch(trainer, trainer.current_epoch)
        self._validated = 0
        self._name_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count_batches(trainer, batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == _epochs(trainer):
            self._hide()  # Lightning says at once why it stops, past the bar

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say_epoch(trainer, trainer.current_epoch, ends=True)
        self._hide()

    def on_validation_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        if trainer.state.fn != "fit":
            self._count_evaluated(trainer.num_val_batches, *given[3:])
        elif not trainer.sanity_checking:
            self._validated += 1
            self._count_batches(trainer, lightning_internals.training_batches(trainer).ready)

    def _count_batches(self, trainer: pl.Trainer, trained: int) -> None:
        """Count what is done of all epochs, those of validation included."""
        training, validation = trainer.num_training_batches, _validation_batches(trainer)
        epochs = _epochs(trainer)
        if not self._enabled or epochs is None or not math.isfinite(training):
            return
        each = int(training) + validation
        validated = self._validated // (trainer.check_val_every_n_epoch or 1)  # as of an average epoch
        self._count(trainer.current_epoch * each + trained + validated, epochs * each)

    def _name_epoch(self, trainer: pl.Trainer) -> None:
        if self._bar is not None:
            of = _epochs(trainer)
            self._bar.tell(f"Epoch {trainer.current_epoch + 1}{f'/{of}' if of else ''}", _metrics(trainer))

    def _say_epoch(self, trainer: pl.Trainer, done: int, ends: bool = False) -> None:
        """Say what an epoch came to, where there is no bar: of so few of them that a file of lines stays short."""
        if not self._enabled or self._bar is not None or on_a_terminal() or done <= self._first:
            return
        epochs = _epochs(trainer)
        if not ends and done < self._next_line:
            return
        step = math.ceil(epochs / MOST_LINES) if epochs else max(1, int(done * GROWTH) - done)
        self._next_line = (done // step + 1) * step
        left = f"; {clock(self._pace.left)} left" if epochs and not ends else ""
        # What an earlier epoch's validation came to is no news of this one.
        told = [metric for metric in _metrics(trainer) if self._validated or not metric.startswith("val/")]
        print_rank_zero(f"Epoch {done}{f'/{epochs}' if epochs else ''}: {', '.join(told)}{left}")

    # --- the other verbs

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._show("Validating")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Testing")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show("Predicting")

    def on_test_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        self._count_evaluated(trainer.num_test_batches, *given[3:])

    def on_predict_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        self._count_evaluated(trainer.num_predict_batches, *given[3:])

    def _count_evaluated(self, batches: list[int | float], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what is done of the batches of all loaders."""
        total, done = sum(batches), int(sum(batches[:dataloader_idx])) + batch_idx + 1
        self._count(done, int(total) if math.isfinite(total) else None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._hide()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hide()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hide()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._hide()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._hide()


def _epochs(trainer: pl.Trainer) -> int | None:
    """How many there will be, if nothing stops the fit before; ``None`` where nobody knows."""
    bounds = [trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    batches = trainer.num_training_batches
    if trainer.max_steps >= 0 and 0 < batches < math.inf:
        bounds.append(math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches))
    return min(bounds, default=None)


def _validation_batches(trainer: pl.Trainer) -> int:
    """Of an epoch, on average."""
    batches = sum(trainer.num_val_batches) if trainer.enable_validation else 0
    if not math.isfinite(batches):
        return 0
    times = lightning_internals.validations_per_epoch(trainer)
    return int(batches) * times // (trainer.check_val_every_n_epoch or 1)


def _metrics(trainer: pl.Trainer) -> list[str]:
    """What was logged for a bar, the most telling first."""
    values = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    order = sorted(values, key=lambda name: (not name.endswith("accuracy"), not name.startswith("val")))
    return [f"{name} {values[name]:.4f}" for name in order]
