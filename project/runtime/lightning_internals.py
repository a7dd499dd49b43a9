"""All use of Lightning's private or undocumented API, one function each.

``tests/runtime/test_lightning_internals.py`` holds a contract test for each function, so that a Lightning that changes
one of them fails there. The private hooks of LightningCLI are in :mod:`project.runtime.lightning_cli`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping


class Progress(NamedTuple):
    """Counts of one of Lightning's progress trackers, for the current epoch or run.

    Attributes:
        ready: Items whose processing has begun.
        processed: Items that are processed; their last hooks may still run.
        completed: Items whose hooks have run too.
    """

    ready: int
    processed: int
    completed: int


def _current(tracker: Any) -> Progress:
    return Progress(tracker.current.ready, tracker.current.processed, tracker.current.completed)


def epochs(trainer: pl.Trainer) -> Progress:
    """Count the epochs of a fit. Relies on ``fit_loop.epoch_progress``."""
    return _current(trainer.fit_loop.epoch_progress)


def training_batches(trainer: pl.Trainer) -> Progress:
    """Count the training batches of the current epoch. Relies on ``fit_loop.epoch_loop.batch_progress``."""
    return _current(trainer.fit_loop.epoch_loop.batch_progress)


def validation_batches(trainer: pl.Trainer) -> Progress:
    """Count the batches of a fit's current validation. Relies on ``fit_loop.epoch_loop.val_loop.batch_progress``."""
    return _current(trainer.fit_loop.epoch_loop.val_loop.batch_progress)


def validations_per_epoch(trainer: pl.Trainer) -> int:
    """Number of validations in an epoch that has any. Relies on ``Trainer.val_check_batch``."""
    if not trainer.val_check_batch:
        return 1
    return max(1, int(trainer.num_training_batches / trainer.val_check_batch))


def is_resuming_epoch(trainer: pl.Trainer) -> bool:
    """Whether a fit continues an epoch that a checkpoint has interrupted. Relies on ``fit_loop.restarting``."""
    return bool(trainer.fit_loop.restarting)


def is_restoring(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint has been read and not all of it is restored yet.

    Relies on ``_checkpoint_connector._loaded_checkpoint``, which Lightning empties once everything is restored.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def logging_step(trainer: pl.Trainer) -> int:
    """The step that Lightning logs the metrics of an epoch with. Relies on ``epoch_loop._batches_that_stepped``."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def accumulates_gradients(trainer: pl.Trainer) -> bool:
    """Whether the last batch only added to the gradients. Relies on ``fit_loop._should_accumulate()``."""
    return bool(trainer.fit_loop._should_accumulate())


def end_restart(trainer: pl.Trainer) -> None:
    """Mark a resumed epoch as an ordinary one. Relies on ``fit_loop._restarting``.

    At the end of a resumed epoch, Lightning does not step schedulers that watch a metric. The public property
    ``restarting`` would also reset the loops below.
    """
    trainer.fit_loop._restarting = False


def count_scheduler_step(trainer: pl.Trainer) -> None:
    """Count a scheduler's step that a callback has taken. Relies on ``epoch_loop.scheduler_progress``."""
    progress = trainer.fit_loop.epoch_loop.scheduler_progress
    progress.increment_ready()
    progress.increment_completed()


def discard_started_batches(trainer: pl.Trainer) -> int:
    """Let no batch count twice that was started but not finished, so that the next resume reads the right sums.

    Relies on the ``total`` counts of ``epoch_loop.batch_progress`` and ``epoch_loop.val_loop.batch_progress``.

    Returns:
        Number of validation batches of this epoch that are completed.
    """
    loop = trainer.fit_loop.epoch_loop
    training: Any = loop.batch_progress.total
    training.ready = training.started = training.processed
    validation: Any = loop.val_loop.batch_progress.total
    validation.reset_on_restart()
    return int(validation.completed)


def set_validated_batches(trainer: pl.Trainer, count: int) -> None:
    """Set the number of completed validation batches of this epoch. Relies on ``val_loop.batch_progress.total``.

    Args:
        trainer: The trainer of the fit.
        count: What :func:`discard_started_batches` has returned.
    """
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.completed = count
    total.reset_on_restart()


def make_resumable(checkpoint: dict[str, Any], validating: bool, accumulates: bool) -> None:
    """Edit the loops' state in a checkpoint so that Lightning resumes an unfinished epoch exactly where it was.

    Relies on the keys of ``checkpoint["loops"]["fit_loop"]``, and on how ``epoch_loop.reset()`` reads them.

    Args:
        checkpoint: Changed in place.
        validating: Whether it is saved within a validation, which starts again from its first batch.
        accumulates: Whether the last batch only added to the gradients.
    """
    loops = checkpoint["loops"]["fit_loop"]
    if validating:
        progress = loops["epoch_loop.val_loop.batch_progress"]
        before = progress["total"]["completed"] - progress["current"]["completed"]  # of the epoch's other validations
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        total = {name: count + before for name, count in begun.items()}
        progress.update(total=total, current=begun, is_last_batch=False)
    elif not accumulates:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds one when it resumes


def epochs_of_checkpoint(checkpoint: Mapping[str, Any]) -> int:
    """Number of epochs that a checkpoint's fit has completed.

    Relies on the keys of ``checkpoint["loops"]["fit_loop"]``.

    Raises:
        KeyError, TypeError, ValueError: The checkpoint has no such count.
    """
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of a module; ``None`` where it has none. Relies on ``LightningModule.trainer`` raising then."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def loop_state(trainer: pl.Trainer) -> dict[str, Any]:
    """State of the loop of the current verb, in the form in which a checkpoint has it under ``loops``.

    Relies on the loops' names and on their ``state_dict()``.
    """
    name = f"{trainer.state.fn.value}_loop" if trainer.state.fn is not None else ""
    return {name: getattr(trainer, name).state_dict()} if name else {}


def training_loader(trainer: pl.Trainer) -> Any:
    """The loader that a fit trains with, as it was given; ``None`` where it has none.

    Relies on ``fit_loop.setup_data()``.
    """
    trainer.fit_loop.setup_data()
    return trainer.train_dataloader


def validation_data(trainer: pl.Trainer) -> Any:
    """The object that gives a fit its validation loader. Relies on ``val_loop._data_source.instance``."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source.instance


def release_subprocesses(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Take over the processes that Lightning has started beside this one. Relies on ``strategy.launcher.procs``.

    Lightning watches them no longer. It would kill this process as soon as one of them ends.

    Returns:
        The processes; empty where Lightning has started none.
    """
    processes: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    found = list(processes)
    processes.clear()
    return found


def checks_after_training_epoch(stopping: EarlyStopping) -> bool:
    """Whether EarlyStopping checks its metric after training epochs rather than after validations.

    Relies on ``EarlyStopping._check_on_train_epoch_end``, which Lightning sets in ``setup()``.
    """
    return bool(stopping._check_on_train_epoch_end)


def would_stop(stopping: EarlyStopping, value: float) -> bool:
    """Whether a value of its metric makes EarlyStopping end the fit; this changes its counts.

    Relies on ``EarlyStopping._evaluate_stopping_criteria()``.
    """
    return bool(stopping._evaluate_stopping_criteria(torch.tensor(value))[0])
