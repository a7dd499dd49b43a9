"""Resuming Lightning's EarlyStopping, and reporting why it stopped a fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from project.runtime import lightning_internals


def stop_reason(trainer: pl.Trainer) -> str | None:
    """Why EarlyStopping has stopped a fit; ``None`` if it has not."""
    callback = _stopping_callback(trainer)
    return None if callback is None else _one_line(str(callback.stopping_reason_message))


def stop_metric(trainer: pl.Trainer) -> str | None:
    """The metric by which EarlyStopping has stopped a fit; ``None`` if it has not."""
    callback = _stopping_callback(trainer)
    return None if callback is None else callback.monitor


def _stopping_callback(trainer: pl.Trainer) -> EarlyStopping | None:
    callbacks = early_stopping_callbacks(trainer) if trainer.should_stop else ()
    return next((callback for callback in callbacks if callback.stopping_reason_message), None)


def early_stopping_callbacks(trainer: pl.Trainer) -> Iterator[EarlyStopping]:
    """The trainer's EarlyStopping callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (callback for callback in callbacks if isinstance(callback, EarlyStopping))


def restore_early_stopping(
    trainer: pl.Trainer, checkpoint: dict[str, Any], monitored: Mapping[str, float] | None, counted: bool
) -> str | None:
    """Correct the EarlyStopping states in a checkpoint before Lightning restores them.

    The callbacks' current arguments, such as a larger patience, override those in the checkpoint, unlike in Lightning.

    Args:
        trainer: The trainer of the resumed fit.
        checkpoint: As read; the states in it are changed.
        monitored: Last values of the monitored metrics by name; ``None`` if the checkpoint has none.
        counted: Whether EarlyStopping has already counted a validation that is repeated on resume.

    Returns:
        Why EarlyStopping would immediately stop the resumed fit; ``None`` if it would not.
    """
    for callback in early_stopping_callbacks(trainer):
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is None:
            continue
        state["patience"] = callback.patience
        if _would_stop_again(callback, state, monitored or {}):
            epochs, steps = lightning_internals.epochs_of_checkpoint(checkpoint), checkpoint["global_step"]
            if epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0):
                return _one_line(str(state["stopping_reason_message"]))
            trainer.should_stop = True  # Lightning stops once min_epochs and min_steps are reached
        else:  # the reason in the checkpoint must not be reported for the resumed fit
            state |= {"stopping_reason": EarlyStoppingReason.NOT_STOPPED.value, "stopping_reason_message": None}
        if counted and not lightning_internals.checks_after_training_epoch(callback):
            state["wait_count"] -= 1
    return None


def _would_stop_again(callback: EarlyStopping, state: Mapping[str, Any], monitored: Mapping[str, float]) -> bool:
    """Whether EarlyStopping has stopped the fit and would also do so with its current arguments."""
    value = monitored.get(callback.monitor)
    if value is None or state["stopping_reason"] == EarlyStoppingReason.NOT_STOPPED.value:
        return False
    trial = copy.deepcopy(callback)
    trial.load_state_dict({**state, "wait_count": state["wait_count"] - 1})  # the check counts the last value again
    return lightning_internals.would_stop(trial, value)


def _one_line(message: str) -> str:
    """Lightning's message in one line; it may come from an untrusted checkpoint."""
    return " ".join(message.split())[:200].partition(" Signaling ")[0]
