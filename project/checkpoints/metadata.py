"""Training metadata in a checkpoint: split settings, completed epochs, seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.errors import damaged_checkpoint
from project.runtime.lightning_internals import epochs_of_checkpoint

#: Types of the settings that define the split.
SPLIT_SETTINGS: dict[str, tuple[type, ...]] = {
    "val_fraction": (float, int),
    "test_fraction": (float, int),
    "fold": (str, type(None)),
    "split_seed": (int,),
    "per_class": (int, type(None)),
}


def split_settings(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The settings that split the checkpoint's training data; empty if it has none.

    Args:
        checkpoint: From :func:`project.checkpoints.reader.read_checkpoint`.
        path: The checkpoint's file, for the message.

    Raises:
        CheckpointError: The settings are invalid.
    """
    settings = checkpoint["transfer"].get("split") or {}
    if not isinstance(settings, dict) or any(
        not isinstance(value, SPLIT_SETTINGS.get(key, ())) for key, value in settings.items()
    ):
        raise damaged_checkpoint(f"{path} is damaged: its split settings are invalid: {settings}.")
    return settings


def completed_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Number of epochs that a checkpoint's fit has completed.

    Raises:
        CheckpointError: The count is missing or invalid.
    """
    try:
        return epochs_of_checkpoint(checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_checkpoint("The checkpoint is damaged: it has no valid number of completed epochs.") from error


def fit_seed(checkpoint: Mapping[str, Any]) -> int | None:
    """The seed of a checkpoint's fit; ``None`` if it is unknown."""
    resume = checkpoint.get("resume")
    seed = resume.get("seed") if isinstance(resume, dict) else None
    return seed if type(seed) is int and 0 <= seed < 2**32 else None
