"""What a validation has measured, for a model card to tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What validation has measured at the best epoch.

    Attributes:
        epoch: Which one, from 1; ``None`` if that is not known.
        metrics: By their names, such as ``val/accuracy``.
        images: How many; 0 if that is not known.
        confusion: Counts ``(C, C)``, or ``(C, 2)`` of a great many classes; ``None`` if not known.
        calibration: Images, sums of their probabilities, and how many were right, ``(10, 3)``; ``None`` if not known.
    """

    epoch: int | None
    metrics: Mapping[str, float]
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


def images_of(count: int, kind: str = "") -> str:
    """A number of images in words."""
    return f"{count:,} {kind}image{'' if count == 1 else 's'}"
