"""Gain in accuracy over the initial head, paired on the same validation images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from project.evaluation.confusion import ImagePredictions
from project.evaluation.paired_intervals import newcombe_paired
from project.runtime.distributed import ProcessGroup


@dataclass(frozen=True)
class CorrectImages:
    """Which validation images a model classifies correctly.

    Attributes:
        correct: Whether each image is classified correctly, bool ``(N,)``, in the order of the split.
        split: Hash of the split. Results of different splits are not compared.
    """

    correct: np.ndarray
    split: str

    @classmethod
    def gather(cls, predictions: ImagePredictions, split: str) -> CorrectImages:
        """Merge the predictions of all ranks. Collective: all ranks must call it.

        Args:
            predictions: Those of this rank, without padding: of images ``rank, rank + world_size, …`` of the split.
            split: Hash of the split, see :func:`project.data.split_fingerprint.name_fingerprint`.
        """
        parts = ProcessGroup().gather((predictions.predicted == predictions.labels).numpy())
        correct = np.empty(sum(map(len, parts)), bool)
        for rank, part in enumerate(parts):
            correct[rank :: len(parts)] = part
        return cls(correct, split)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: one bit per image, packed, uint8 ``(N / 8,)``."""
        return {"bits": torch.from_numpy(np.packbits(self.correct)), "images": len(self.correct), "split": self.split}

    @classmethod
    def from_state(cls, state: Any) -> CorrectImages | None:
        """Restore the results from a checkpoint; ``None`` if malformed, because resuming does not depend on them."""
        if not isinstance(state, dict):
            return None
        bits, images, split = (state.get(key) for key in ("bits", "images", "split"))
        if not isinstance(bits, torch.Tensor) or bits.dtype != torch.uint8 or type(images) is not int:
            return None
        if images < 1 or bits.shape != (-(-images // 8),) or type(split) is not str:
            return None
        return cls(np.unpackbits(bits.numpy(), count=images).astype(bool), split)


class Gain(NamedTuple):
    """Difference in validation accuracy between the best epoch and the initial head.

    Attributes:
        points: The difference in percentage points.
        low: Lower limit of its 95 % interval, see :func:`~project.evaluation.paired_intervals.newcombe_paired`.
        high: Upper limit.
        images: Number of validation images.
        is_none: Whether the best epoch is the initial head itself.
    """

    points: float
    low: float
    high: float
    images: int
    is_none: bool

    @classmethod
    def between(cls, best: CorrectImages | None, initial: CorrectImages | None, is_none: bool = False) -> Gain | None:
        """The gain of the best epoch; ``None`` if results are missing, or are those of different images."""
        if best is None or initial is None or best.split != initial.split:
            return None
        if not len(best.correct) or len(best.correct) != len(initial.correct):
            return None
        difference = float(best.correct.mean() - initial.correct.mean())
        low, high = newcombe_paired(best.correct, initial.correct)
        return cls(100 * difference, 100 * low, 100 * high, len(best.correct), is_none)

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images:,} images"
        if self.is_none:
            return f"none: no epoch is better on {images}"
        points, low, high = (f"{round(value, 1) + 0.0:+.1f}" for value in (self.points, self.low, self.high))
        text = f"{points} points (95 % interval {low} to {high}, paired on {images})"
        doubt = ", not significant" if self.low <= 0 <= self.high else ""
        return f"{text}{doubt}; optimistic, because the epoch is chosen on these images"
