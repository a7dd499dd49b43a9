"""Summary of a validation, for checkpoints and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from project.evaluation.candidates import Weights
from project.evaluation.confusion import ConfusionCounts
from project.evaluation.gain import CorrectImages
from project.evaluation.metrics import BINS

#: Accepted dtypes of the tables.
TABLE_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class EvaluationSummary:
    """Validation results of the best epoch.

    Attributes:
        epoch: Epoch, from 0; -1 before the first one; ``None`` if it belongs to an earlier fit, of which only the
            score is known.
        metrics: Metrics by name, such as ``val/accuracy``.
        images: Number of validated images; 0 if unknown.
        confusion: Counts ``(C, C)``, or ``(C, 2)`` for many classes, see
            :class:`~project.evaluation.confusion.ConfusionCounts`; ``None`` if unknown.
        calibration: Images, summed confidence and correct predictions per confidence bin, ``(15, 3)``; ``(10, 3)`` in
            checkpoints of earlier versions; ``None`` if unknown.
        weights: The weights that were validated: those of the optimizer, or their average. Of interpolated weights,
            those at the end of the interpolation.
        correct: Which images are classified correctly; ``None`` if unknown.
        interpolated: Position of the evaluated weights between the start of the fit, 0, and the epoch, 1; ``None`` for
            the weights of the epoch itself.
    """

    epoch: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    confusion: np.ndarray | None = None
    calibration: np.ndarray | None = None
    weights: Weights = "raw"
    correct: CorrectImages | None = None
    interpolated: float | None = None

    @classmethod
    def of(
        cls, epoch: int | None, metrics: Mapping[str, float], counts: ConfusionCounts, **fields: Any
    ) -> EvaluationSummary:
        """Summarize an evaluation by its metrics and counts.

        Args:
            epoch: See the class.
            metrics: See the class.
            counts: Counts of all images.
            fields: ``weights``, ``correct`` and ``interpolated``.
        """
        confusion = counts.confusion.int().numpy()  # int32 halves its size in the checkpoint
        return cls(epoch, metrics, counts.images, confusion, counts.calibration.numpy(), **fields)

    @property
    def per_class(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Correct images and all images of each class, ``(C,)`` each; ``None`` if unknown."""
        if self.confusion is None:
            return None
        if self.confusion.shape[0] == self.confusion.shape[1]:
            return np.diagonal(self.confusion), self.confusion.sum(1)
        return self.confusion[:, 1], self.confusion[:, 0]

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: plain types and tensors."""
        return {
            "epoch": self.epoch,
            "metrics": dict(self.metrics),
            "images": self.images,
            "confusion": None if self.confusion is None else torch.from_numpy(self.confusion),
            "calibration": None if self.calibration is None else torch.from_numpy(self.calibration),
            "weights": self.weights,
            "correct": None if self.correct is None else self.correct.state(),
            **({} if self.interpolated is None else {"interpolated": self.interpolated}),
        }

    @classmethod
    def from_state(cls, state: Any, num_classes: int) -> EvaluationSummary | None:
        """Restore a summary from a checkpoint; ``None`` if malformed, because resuming does not depend on it."""
        if not isinstance(state, dict):
            return None
        epoch, metrics, images = (state.get(key) for key in ("epoch", "metrics", "images"))
        if type(epoch) is not int or type(images) is not int or not isinstance(metrics, dict):
            return None
        if not all(type(name) is str and type(value) is float for name, value in metrics.items()):
            return None
        weights: Weights = "ema" if state.get("weights") == "ema" else "raw"  # earlier versions had no average
        confusion = _table(state.get("confusion"), (num_classes, num_classes), (num_classes, 2))
        calibration = _table(state.get("calibration"), (BINS, 3), (10, 3))  # earlier versions had 10 bins
        if confusion is None or calibration is None:
            confusion = calibration = None
        interpolated = state.get("interpolated")
        return cls(
            epoch,
            metrics,
            images,
            confusion,
            calibration,
            weights,
            CorrectImages.from_state(state.get("correct")),
            interpolated if type(interpolated) is float else None,
        )


def _table(value: Any, *shapes: tuple[int, int]) -> np.ndarray | None:
    """Convert a table of counts with one of the given shapes; ``None`` if invalid."""
    if not isinstance(value, torch.Tensor) or value.dtype not in TABLE_DTYPES or tuple(value.shape) not in shapes:
        return None
    return value.detach().numpy() if (value >= 0).all() else None
