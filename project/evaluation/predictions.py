"""What a validation found out image by image, as far as it is to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from project.evaluation.confusion import ImagePredictions

#: Probabilities that are kept, as many as 16 MB hold, of at most so many images.
MOST_VALUES, MOST_IMAGES = 4_000_000, 10_000


@dataclass(frozen=True)
class ValidationPredictions:
    """The classes that images have and got; all tensors are on the CPU.

    Attributes:
        indices: Which image of the split each is, int64 ``(N,)``, ascending.
        labels: Their classes, int64 ``(N,)``.
        predicted: The classes that they got, int64 ``(N,)``.
        confidence: Probabilities of those, float32 ``(N,)``.
        probability_indices: Indices of the images whose probabilities are kept, int64 ``(n,)``.
        probabilities: Of these, float32 ``(n, C)``.
        feature_indices: Indices of the images whose features are kept, int64 ``(m,)``.
        features: Of these, float32 ``(m, D)``.
    """

    indices: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    probability_indices: torch.Tensor
    probabilities: torch.Tensor
    feature_indices: torch.Tensor
    features: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> torch.Tensor:
        """Whether each got its own class, bool ``(N,)``."""
        return self.labels == self.predicted

    def counts(self, classes: int) -> torch.Tensor:
        """Images by class, the rows, and by the class that they got, int64 ``(C, C)``."""
        return torch.bincount(self.labels * classes + self.predicted, minlength=classes**2).view(classes, classes)

    def by_class(self, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many images of each class got it, how many have it, and how many got it: int64 ``(C,)`` each."""
        hits, had, got = (
            torch.bincount(each, minlength=classes) for each in (self.labels[self.correct], self.labels, self.predicted)
        )
        return hits, had, got

    def mistakes(self, most: int) -> torch.Tensor:
        """Which images got another class with the greatest confidence, int64 ``(<= most,)``."""
        wrong = (~self.correct).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)[:most]]

    def doubtful(self, most: int) -> torch.Tensor:
        """Which images got their class with the least confidence, right or wrong, int64 ``(<= most,)``."""
        return self.confidence.argsort(stable=True)[:most]


@dataclass
class _Parts:
    """Rows of an epoch: every so many-th, from the beginning on, up to a number of them."""

    every: int
    most: int
    indices: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, rows: torch.Tensor, before: int) -> None:
        first = min(-before % self.every, len(rows))
        taken = torch.arange(first, len(rows), self.every)[: max(self.most - self.count, 0)]
        if len(taken):
            whole = len(taken) == len(rows)
            self.rows.append(rows.detach() if whole else rows.detach()[taken.to(rows.device)])
            self.indices.append(taken + before)
            self.count += len(taken)


class PredictionCollector:
    """Collects what :class:`ValidationPredictions` needs of each batch, on its device: nothing waits for that device.

    It holds probabilities of as many images as 16 MB hold, and features of some. These are taken from all over the
    split, as a split often lies class by class. What became of each image is known: see
    :class:`~project.evaluation.confusion.ImagePredictions`.

    Args:
        expected: Images of the epoch, of this process, where that is known.
        points: Images of which features are kept.
        classes: Number of classes.
        rank: Of this process, which has images ``rank, rank + world_size, …`` of the split.
        world_size: Number of processes.
    """

    def __init__(self, expected: int | None, points: int, classes: int, rank: int = 0, world_size: int = 1) -> None:
        images = max(min(MOST_IMAGES, MOST_VALUES // max(classes, 1)) // world_size, 1)
        self._rank, self._world = rank, world_size
        self._probabilities = _Parts(_stride(expected, images), images)
        points = -(-points // world_size)
        self._features = _Parts(_stride(expected, points), points)
        self._count = 0

    def batch(self, probabilities: torch.Tensor, features: torch.Tensor) -> None:
        """Take a batch, without padding: probabilities ``(B, C)`` and features ``(B, D)``."""
        self._probabilities.add(probabilities, self._count)
        self._features.add(features, self._count)
        self._count += len(probabilities)

    def outcome(self, each: ImagePredictions) -> ValidationPredictions:
        """All that was taken.

        Args:
            each: The answers to the same images.
        """

        def kept(parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
            return _joined(parts.indices, torch.int64), _joined(parts.rows, torch.float32)

        return ValidationPredictions(
            torch.arange(len(each.labels)) * self._world + self._rank,
            each.labels,
            each.predicted,
            each.confidence,
            *kept(self._probabilities),
            *kept(self._features),
        )


def _stride(expected: int | None, most: int) -> int:
    return max(-(-(expected or 0) // max(most, 1)), 1)


def _joined(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(list(parts)).to("cpu", dtype) if parts else torch.zeros(0, dtype=dtype)


def merge_predictions(outcomes: Sequence[ValidationPredictions]) -> ValidationPredictions:
    """The outcome of all processes, in the order of the split."""
    starts = torch.tensor([0, *(len(one) for one in outcomes)]).cumsum(0).tolist()
    indices = torch.cat([one.indices for one in outcomes])
    order = indices.argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))

    def all_of(name: str) -> torch.Tensor:
        parts = [getattr(one, name) for one in outcomes]
        return torch.cat([part for part in parts if part.numel()] or parts[:1])

    def moved(name: str) -> torch.Tensor:
        return torch.cat([back[getattr(one, name) + start] for one, start in zip(outcomes, starts, strict=False)])

    return ValidationPredictions(
        indices=indices[order],
        labels=all_of("labels")[order],
        predicted=all_of("predicted")[order],
        confidence=all_of("confidence")[order],
        probability_indices=moved("probability_indices"),
        probabilities=all_of("probabilities"),
        feature_indices=moved("feature_indices"),
        features=all_of("features"),
    )
