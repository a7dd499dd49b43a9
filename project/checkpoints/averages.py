"""Averaged weights in a checkpoint.

A checkpoint of a fit with ``model.ema`` has the raw weights and their average: one of them in ``state_dict``, the other
one in ``average``. The entry ``weights`` of ``transfer`` says which are in ``state_dict``: ``raw`` or ``ema``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from project.checkpoints.compatibility import validate_tensors
from project.checkpoints.reader import require_tensors
from project.errors import CheckpointError, damaged_checkpoint
from project.models.weight_average import WeightAverage

KEY = "average"


def save_average(checkpoint: dict[str, Any], average: WeightAverage) -> None:
    """Add averages to a checkpoint whose ``state_dict`` has the raw weights."""
    checkpoint[KEY] = {"updates": average.updates, "tensors": dict(average.tensors)}


def exchange(checkpoint: dict[str, Any]) -> None:
    """Exchange the weights in ``state_dict`` with those in ``average``.

    Raises:
        CheckpointError: The checkpoint has no valid average.
    """
    entry = _entry(checkpoint)
    if entry is None:
        raise damaged_checkpoint("The checkpoint is damaged: it has averaged weights, but not the raw ones.")
    checkpoint[KEY] = {**entry, "tensors": checkpoint["state_dict"]}
    checkpoint["state_dict"] = entry["tensors"]


def restore_average(
    checkpoint: Mapping[str, Any], expected: Mapping[str, torch.Tensor], average: WeightAverage
) -> None:
    """Restore the averages of a checkpoint whose ``state_dict`` has the raw weights.

    If it has none, because its fit had no ``model.ema``, the resumed fit starts a new average.

    Args:
        checkpoint: As read.
        expected: The averaged tensors of the model by name.
        average: Receives the averages.

    Raises:
        CheckpointError: The averages are damaged.
    """
    entry = _entry(checkpoint)
    if entry is None or not entry["updates"]:
        return
    try:
        validate_tensors(expected, entry["tensors"])
    except CheckpointError as error:
        raise damaged_checkpoint(f"The checkpoint is damaged: its average does not fit the model ({error}).") from error
    average.restore(entry["updates"], entry["tensors"])


def _entry(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The validated entry; ``None`` if there is none."""
    entry = checkpoint.get(KEY)
    if entry is None:
        return None
    updates, tensors = (entry.get("updates"), entry.get("tensors")) if isinstance(entry, dict) else (None, None)
    if type(updates) is not int or updates < 0 or not isinstance(tensors, dict):
        raise damaged_checkpoint("The checkpoint is damaged: its averaged weights are invalid.")
    require_tensors(tensors, KEY)
    return {"updates": updates, "tensors": tensors}
