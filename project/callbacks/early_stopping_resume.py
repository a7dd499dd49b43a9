"""Lightning's EarlyStopping in a fit that goes on, and what it says of one that it has ended."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from project.runtime import lightning_internals


def reason(trainer: pl.Trainer) -> str | None:
    """Why EarlyStopping has ended a fit; ``None`` where it has not."""
    if not trainer.should_stop:
        return None
    said = (
        _plain(each.stopping_reason_message)
        for each in early_stopping_callbacks(trainer)
        if each.stopping_reason_message
    )
    return next(said, None)


def early_stopping_callbacks(trainer: pl.Trainer) -> Iterator[EarlyStopping]:
    """The trainer's callbacks of this kind."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (each for each in callbacks if isinstance(each, EarlyStopping))


def restore_early_stopping(
    trainer: pl.Trainer, checkpoint: dict[str, Any], watched: Mapping[str, float] | None, counted: bool
) -> str | None:
    """Bring each one's state in a checkpoint to where the fit goes on, before Lightning restores it.

    What is asked for now, such as more patience, beats what the checkpoint says; Lightning has it the other way.

    Args:
        trainer: Of the fit that goes on.
        checkpoint: As read; the states in it are changed.
        watched: Last values of metrics by name, those that these monitor among them; ``None`` where none were kept.
        counted: Whether the checkpoint was saved when they had counted a validation that will be repeated.

    Returns:
        Why one has ended the fit, where it would do it again at once; ``None`` where the fit goes on.
    """
    for stopping in early_stopping_callbacks(trainer):
        state = checkpoint.get("callbacks", {}).get(stopping.state_key)
        if state is None:
            continue
        state["patience"] = stopping.patience
        if _ends(stopping, state, watched or {}):
            if _may_end(trainer, checkpoint):
                return _plain(str(state["stopping_reason_message"]))
            trainer.should_stop = True  # as soon as it may
        else:  # whatever ends the fit now, it is something else
            state |= {"stopping_reason": EarlyStoppingReason.NOT_STOPPED.value, "stopping_reason_message": None}
        if counted and not lightning_internals.checks_after_training_epoch(stopping):
            state["wait_count"] -= 1
    return None


def _ends(stopping: EarlyStopping, state: Mapping[str, Any], watched: Mapping[str, float]) -> bool:
    """Whether it has ended the fit, and would have as it is asked for now."""
    value = watched.get(stopping.monitor)
    if value is None or state["stopping_reason"] == EarlyStoppingReason.NOT_STOPPED.value:
        return False
    again = copy.deepcopy(stopping)
    again.load_state_dict({**state, "wait_count": state["wait_count"] - 1})  # what it is asked about is counted in it
    return lightning_internals.would_stop(again, value)


def _may_end(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a fit has had the epochs and the steps that it is to have at least."""
    epochs = lightning_internals.epochs_of_checkpoint(checkpoint)
    return bool(epochs >= (trainer.min_epochs or 0) and checkpoint["global_step"] >= (trainer.min_steps or 0))


def _plain(message: str) -> str:
    """Lightning's message in a line, which may come from a stranger's checkpoint."""
    return " ".join(message.split())[:200].partition(" Signaling ")[0]
