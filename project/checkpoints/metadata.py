"""What a checkpoint says besides its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.errors import damaged_checkpoint
from project.runtime.lightning_internals import epochs_of_checkpoint

#: How a fit has held images out, and of what type each setting is.
SPLIT: dict[str, tuple[type, ...]] = {
    "val_fraction": (float, int),
    "test_fraction": (float, int),
    "fold": (str, type(None)),
    "split_seed": (int,),
}


def split_settings(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """How images were held out of what the checkpoint's model was trained on; empty if it does not say.

    Args:
        checkpoint: What :func:`project.checkpoints.reader.read_checkpoint` has read.
        path: Where from, for the message.

    Raises:
        CheckpointError: What it says makes no sense.
    """
    values = checkpoint["transfer"].get("split") or {}
    if not isinstance(values, dict) or any(not isinstance(values[key], SPLIT.get(key, ())) for key in values):
        raise damaged_checkpoint(f"{path} does not say in a way that makes sense how images were held out: {values}.")
    return values


def epochs_of(checkpoint: Mapping[str, Any]) -> int:
    """How many epochs a checkpoint's fit has been through, to their end.

    Raises:
        CheckpointError: It does not say.
    """
    try:
        return epochs_of_checkpoint(checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_checkpoint("The checkpoint is damaged: it does not say how many epochs it has had.") from error


def seed_of(checkpoint: Mapping[str, Any]) -> int | None:
    """The seed of a checkpoint's fit; ``None`` where it is not known."""
    kept = checkpoint.get("resume")
    seed = kept.get("seed") if isinstance(kept, dict) else None
    return seed if type(seed) is int and 0 <= seed < 2**32 else None
