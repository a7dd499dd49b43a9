"""What a validation has measured, for a checkpoint to keep and a model card to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from project.evaluation.metrics import BINS

#: Of counts and sums.
TABLE_TYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class EvaluationSummary:
    """What validation has measured at the best epoch.

    Attributes:
        epoch: Which one, from 0; ``None`` of one before this fit, of which the score alone is known.
        metrics: By their names, such as ``val/accuracy``.
        images: How many were validated; 0 where that is not known.
        confusion: Counts ``(C, C)``, or ``(C, 2)`` of a great many classes: see
            :class:`~project.evaluation.confusion.ConfusionCounts`; ``None`` where it is not known.
        calibration: Images, summed confidence and correct answers in each bin of confidence, ``(15, 3)``; ``(10, 3)``
            in checkpoints of earlier versions; ``None`` where it is not known.
    """

    epoch: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    confusion: np.ndarray | None = None
    calibration: np.ndarray | None = None

    @property
    def per_class(self) -> tuple[np.ndarray, np.ndarray] | None:
        """How many images of each class were right, and how many there are: ``(C,)`` each."""
        if self.confusion is None:
            return None
        if self.confusion.shape[0] == self.confusion.shape[1]:
            return np.diagonal(self.confusion), self.confusion.sum(1)
        return self.confusion[:, 1], self.confusion[:, 0]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain types and tensors."""
        return {
            "epoch": self.epoch,
            "metrics": dict(self.metrics),
            "images": self.images,
            "confusion": None if self.confusion is None else torch.from_numpy(self.confusion),
            "calibration": None if self.calibration is None else torch.from_numpy(self.calibration),
        }

    @classmethod
    def from_state(cls, found: Any, classes: int) -> EvaluationSummary | None:
        """What a checkpoint says of the best epoch; nothing where that is not of its form: no fit depends on it."""
        if not isinstance(found, dict):
            return None
        epoch, metrics, images = (found.get(key) for key in ("epoch", "metrics", "images"))
        if type(epoch) is not int or type(images) is not int or not isinstance(metrics, dict):
            return None
        if not all(type(name) is str and type(value) is float for name, value in metrics.items()):
            return None
        confusion = _table(found.get("confusion"), (classes, classes), (classes, 2))
        calibration = _table(found.get("calibration"), (BINS, 3), (10, 3))  # earlier versions had 10 bins
        if confusion is None or calibration is None:
            return cls(epoch, metrics, images)
        return cls(epoch, metrics, images, confusion, calibration)


def _table(found: Any, *shapes: tuple[int, int]) -> np.ndarray | None:
    """Counts of one of some shapes; ``None`` where something is none."""
    if not isinstance(found, torch.Tensor) or found.dtype not in TABLE_TYPES or tuple(found.shape) not in shapes:
        return None
    return found.detach().numpy() if (found >= 0).all() else None
