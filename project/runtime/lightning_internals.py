"""All use of Lightning's private or undocumented API, one function each.

``tests/runtime/test_lightning_internals.py`` has a contract test for each function, which fails if a Lightning release
changes that API. The private hooks of LightningCLI are in :mod:`project.runtime.lightning_cli`.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

C = TypeVar("C", bound=pl.Callback)


class Progress(NamedTuple):
    """Counts of a Lightning progress tracker, for the current epoch or run.

    Attributes:
        ready: Started items.
        processed: Processed items, whose end hooks may not have run yet.
        completed: Items whose end hooks have run.
    """

    ready: int
    processed: int
    completed: int


def _current(tracker: Any) -> Progress:
    return Progress(tracker.current.ready, tracker.current.processed, tracker.current.completed)


def epochs(trainer: pl.Trainer) -> Progress:
    """Epoch counts of a fit. Relies on ``fit_loop.epoch_progress``."""
    return _current(trainer.fit_loop.epoch_progress)


def training_batches(trainer: pl.Trainer) -> Progress:
    """Training batch counts of the current epoch. Relies on ``fit_loop.epoch_loop.batch_progress``."""
    return _current(trainer.fit_loop.epoch_loop.batch_progress)


def validation_batches(trainer: pl.Trainer) -> Progress:
    """Batch counts of a fit's current validation. Relies on ``fit_loop.epoch_loop.val_loop.batch_progress``."""
    return _current(trainer.fit_loop.epoch_loop.val_loop.batch_progress)


def validations_per_epoch(trainer: pl.Trainer) -> int:
    """Number of validations per validated epoch. Relies on ``Trainer.val_check_batch``."""
    if not trainer.val_check_batch:
        return 1
    return max(1, int(trainer.num_training_batches / trainer.val_check_batch))


def is_resuming_epoch(trainer: pl.Trainer) -> bool:
    """Whether the fit resumes within an epoch of the checkpoint. Relies on ``fit_loop.restarting``."""
    return bool(trainer.fit_loop.restarting)


def is_restoring(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint is loaded but not fully restored yet.

    Relies on ``_checkpoint_connector._loaded_checkpoint``, which Lightning empties after restoring.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def logging_step(trainer: pl.Trainer) -> int:
    """Step that Lightning assigns to an epoch's metrics. Relies on ``epoch_loop._batches_that_stepped``."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def validate_before_training(trainer: pl.Trainer) -> None:
    """Run a whole validation before the first epoch, with all hooks and logs. Call it in ``on_train_start``.

    EarlyStopping does not see it: it counts epochs, and its metric may be one of training. Relies on
    ``fit_loop.epoch_loop.val_loop.run()``, as Lightning's sanity check does, and on ``_reset_progress()``.
    """
    loop, callbacks = trainer.fit_loop.epoch_loop.val_loop, trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [item for item in callbacks if not isinstance(item, EarlyStopping)]  # type: ignore[attr-defined]
    trainer.validating = True
    try:
        loop.run()
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
    _reset_progress(loop)
    trainer.training = True


def save_before_training(callback: ModelCheckpoint) -> None:
    """Let a checkpoint callback save before the first step.

    Relies on ``ModelCheckpoint._last_global_step_saved``, which is 0 at first: nothing to save.
    """
    callback._last_global_step_saved = -1


class ModelCheckpointOfCandidates(ModelCheckpoint):
    """ModelCheckpoint that monitors the values that :meth:`monitored` returns, instead of those that are logged.

    Relies on ``ModelCheckpoint._monitor_candidates()``.
    """

    def monitored(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values to monitor, by name.

        Args:
            metrics: A copy of the logged values, by name.
        """
        return metrics

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        return self.monitored(super()._monitor_candidates(trainer))


def run_validation_steps(trainer: pl.Trainer, on_output: Callable[[Any, Any], None]) -> None:
    """Run the validation step on all validation batches of a fit, without callbacks, logs and progress.

    Call it on all ranks of a fit with validation; the step must not log. Relies on how the loop prepares a batch:
    ``convert_input()``, ``_on_before_batch_transfer()``, ``batch_to_device()``.

    Args:
        trainer: The fit's trainer.
        on_output: Called with each batch, on the device, and the output of its step.
    """
    module, strategy, precision = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    stage, was_training = trainer.state.stage, module.training
    load_validation_batches(trainer)
    (loader,) = trainer.fit_loop.epoch_loop.val_loop._combined_loader.flattened  # type: ignore[union-attr]
    (count,) = trainer.num_val_batches
    trainer.validating = True
    module.eval()
    try:
        with torch.no_grad():
            for index, batch in enumerate(itertools.islice(loader, None if count == float("inf") else int(count))):
                batch = module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
                batch = strategy.batch_to_device(batch, dataloader_idx=0)
                with precision.val_step_context():
                    output = module.validation_step(batch, index)
                on_output(batch, output)
    finally:
        module.train(was_training)
        trainer.state.stage = stage


def load_validation_batches(trainer: pl.Trainer) -> bool:
    """Load the validation batches of a fit as its first validation does, if none has run.

    Relies on ``val_loop.setup_data()`` and ``val_loop._combined_loader``, which is ``None`` until then.

    Returns:
        Whether there are any.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        loop.setup_data()
    return sum(trainer.num_val_batches) > 0


class _FitLoopWithEpochZero(_FitLoop):
    @property
    def skip(self) -> bool:
        if self.max_epochs == 0:
            return self.max_batches == 0 or self.trainer.limit_train_batches == 0
        return super().skip


def start_without_epochs(trainer: pl.Trainer) -> None:
    """Let a fit of 0 epochs call ``on_train_start`` and ``on_train_end``; Lightning returns before them.

    Relies on ``fit_loop.run()``, which asks ``skip`` before these hooks and ``done`` before each epoch.
    """
    trainer.fit_loop.__class__ = _FitLoopWithEpochZero


def run_no_epochs(trainer: pl.Trainer) -> None:
    """Set ``max_epochs`` to 0. Relies on ``fit_loop.max_epochs``."""
    trainer.fit_loop.max_epochs = 0


def skip_ddp(trainer: pl.Trainer) -> None:
    """Do not wrap the module in DistributedDataParallel, which refuses one without trainable parameters.

    Call it in ``setup()``. Relies on ``DDPStrategy.configure_ddp()``, and on its running a module that is not wrapped.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp = lambda: None  # type: ignore[method-assign]


def renew_ddp(trainer: pl.Trainer) -> None:
    """Wrap the module in DistributedDataParallel again: it registers only parameters that require gradients.

    Relies on ``DDPStrategy.configure_ddp()``, which wraps ``strategy.model``, and on
    ``DistributedDataParallel.reducer``, whose hooks on the parameters end with it.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        del strategy.model.reducer
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


def reload_validation_data(trainer: pl.Trainer) -> None:
    """Let the next validation of a fit count its batches anew. Relies on ``val_loop._combined_loader``."""
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def accumulates_gradients(trainer: pl.Trainer) -> bool:
    """Whether the last batch only accumulated gradients. Relies on ``fit_loop._should_accumulate()``."""
    return bool(trainer.fit_loop._should_accumulate())


def set_logged_hyperparameter(module: pl.LightningModule, name: str, value: Any) -> None:
    """Change a hyperparameter that loggers get. Relies on ``LightningModule._hparams_initial``."""
    initial: Any = module._hparams_initial
    initial[name] = value


def end_restart(trainer: pl.Trainer) -> None:
    """Treat a resumed epoch as an ordinary one. Relies on ``fit_loop._restarting``.

    Lightning skips schedulers that monitor a metric at the end of a resumed epoch. Setting the public property
    ``restarting`` would also reset the inner loops.
    """
    trainer.fit_loop._restarting = False


def count_scheduler_step(trainer: pl.Trainer) -> None:
    """Count a scheduler step taken by a callback. Relies on ``epoch_loop.scheduler_progress``."""
    progress = trainer.fit_loop.epoch_loop.scheduler_progress
    progress.increment_ready()
    progress.increment_completed()


def discard_started_batches(trainer: pl.Trainer) -> int:
    """Remove started but unfinished batches from the totals, so that the next resume does not count them twice.

    Relies on the ``total`` counts of ``epoch_loop.batch_progress`` and ``epoch_loop.val_loop.batch_progress``.

    Returns:
        Number of completed validation batches of this epoch.
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
        trainer: The fit's trainer.
        count: Return value of :func:`discard_started_batches`.
    """
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    total.completed = count
    total.reset_on_restart()


def make_resumable(checkpoint: dict[str, Any], validating: bool, accumulates: bool) -> None:
    """Edit the loop state of a checkpoint so that Lightning resumes an unfinished epoch at the exact batch.

    Relies on the keys of ``checkpoint["loops"]["fit_loop"]``, and on how ``epoch_loop.reset()`` reads them.

    Args:
        checkpoint: Modified in place.
        validating: Whether it is saved during a validation, which restarts from its first batch.
        accumulates: Whether the last batch only accumulated gradients.
    """
    loops = checkpoint["loops"]["fit_loop"]
    if validating:
        progress = loops["epoch_loop.val_loop.batch_progress"]
        earlier = progress["total"]["completed"] - progress["current"]["completed"]  # validations of this epoch
        current = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        total = {name: count + earlier for name, count in current.items()}
        progress.update(total=total, current=current, is_last_batch=False)
    elif not accumulates:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds one on resume


def epochs_of_checkpoint(checkpoint: Mapping[str, Any]) -> int:
    """Number of completed epochs recorded in a checkpoint.

    Relies on the keys of ``checkpoint["loops"]["fit_loop"]``.

    Raises:
        KeyError, TypeError, ValueError: The checkpoint has no valid count.
    """
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """The trainer of a module, or ``None``. Relies on ``LightningModule.trainer`` raising RuntimeError without one."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def loop_state(trainer: pl.Trainer) -> dict[str, Any]:
    """State of the current verb's loop, in the form of a checkpoint's ``loops`` entry.

    Relies on the loops' names and on their ``state_dict()``.
    """
    name = f"{trainer.state.fn.value}_loop" if trainer.state.fn is not None else ""
    return {name: getattr(trainer, name).state_dict()} if name else {}


def find_callback(trainer: pl.Trainer, kind: type[C]) -> C | None:
    """The first callback of a class; ``None`` without one. Relies on ``Trainer.callbacks``, which is not annotated."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def training_loader(trainer: pl.Trainer) -> Any:
    """The training dataloader as the user passed it; ``None`` where there is none.

    Relies on ``fit_loop.setup_data()``.
    """
    trainer.fit_loop.setup_data()
    return trainer.train_dataloader


def validation_data(trainer: pl.Trainer) -> Any:
    """The data module or loader that provides the validation data. Relies on ``val_loop._data_source.instance``."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source.instance


def release_subprocesses(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """Remove the processes that Lightning's launcher started from its list. Relies on ``strategy.launcher.procs``.

    Lightning stops watching them; otherwise it would kill this process as soon as one of them exits.

    Returns:
        The processes; empty if Lightning started none.
    """
    watched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    processes = list(watched)
    watched.clear()
    return processes


def checks_after_training_epoch(stopping: EarlyStopping) -> bool:
    """Whether EarlyStopping checks its metric after training epochs instead of validations.

    Relies on ``EarlyStopping._check_on_train_epoch_end``, which Lightning sets in ``setup()``.
    """
    return bool(stopping._check_on_train_epoch_end)


def would_stop(stopping: EarlyStopping, value: float) -> bool:
    """Whether EarlyStopping stops the fit on this metric value; updates its state.

    Relies on ``EarlyStopping._evaluate_stopping_criteria()``.
    """
    return bool(stopping._evaluate_stopping_criteria(torch.tensor(value))[0])
