"""The weights that a validation evaluates: those of the optimizer, and their moving average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

#: ``raw`` are the weights that the optimizer trains; ``ema`` is their exponential moving average.
Weights = Literal["raw", "ema"]
#: Prefix of the validation metrics of each kind of weights.
STAGES: dict[Weights, str] = {"raw": "val", "ema": "val_ema"}


def best_weights(metrics: Mapping[str, torch.Tensor]) -> Weights:
    """The weights with the highest accuracy in the latest validation; ``raw`` if both are equal.

    Args:
        metrics: Logged metrics by name, such as ``val/accuracy`` and ``val_ema/accuracy``.
    """
    raw, average = (metrics.get(f"{stage}/accuracy") for stage in STAGES.values())
    return "ema" if raw is not None and average is not None and bool(average > raw) else "raw"
