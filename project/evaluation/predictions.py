"""Per-image validation predictions for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from project.evaluation.confusion import ImagePredictions

#: Limits on the probabilities that are collected: 16 MB of float32 values.
MAX_VALUES, MAX_IMAGES = 4_000_000, 10_000


@dataclass(frozen=True)
class ValidationPredictions:
    """Per-image validation predictions, on the CPU.

    Attributes:
        indices: Index of each image in the split, int64 ``(N,)``, ascending.
        labels: True classes, int64 ``(N,)``.
        predicted: Predicted classes, int64 ``(N,)``.
        confidence: Probabilities of the predicted classes, float32 ``(N,)``.
        probability_indices: Positions of the images with collected probabilities, int64 ``(n,)``.
        probabilities: Probabilities of these images, float32 ``(n, C)``.
        feature_indices: Positions of the images with collected features, int64 ``(m,)``.
        features: Features of these images, float32 ``(m, D)``.
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
        """Whether each prediction is correct, bool ``(N,)``."""
        return self.labels == self.predicted

    def most_confident_errors(self, count: int) -> torch.Tensor:
        """Positions of the wrong predictions with the highest confidence, int64 ``(<= count,)``."""
        wrong = (~self.correct).nonzero().squeeze(1)
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)[:count]]

    def least_confident(self, count: int) -> torch.Tensor:
        """Positions of the predictions with the lowest confidence, correct or not, int64 ``(<= count,)``."""
        return self.confidence.argsort(stable=True)[:count]


@dataclass
class _Subsample:
    """Every ``stride``-th row of an epoch, up to ``limit`` rows."""

    stride: int
    limit: int
    indices: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    count: int = 0

    @classmethod
    def spread(cls, expected: int | None, limit: int) -> _Subsample:
        """Spread ``limit`` rows evenly over the expected number of rows."""
        return cls(max(-(-(expected or 0) // max(limit, 1)), 1), limit)

    def update(self, rows: torch.Tensor, start: int) -> None:
        """Select from a batch whose first row has index ``start``."""
        first = min(-start % self.stride, len(rows))
        selected = torch.arange(first, len(rows), self.stride)[: max(self.limit - self.count, 0)]
        if len(selected):
            rows = rows.detach()
            self.rows.append(rows if len(selected) == len(rows) else rows[selected.to(rows.device)])
            self.indices.append(selected + start)
            self.count += len(selected)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and rows of the subsample, on the CPU."""
        if not self.rows:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return torch.cat(self.indices), torch.cat(self.rows).to("cpu", torch.float32)


class PredictionCollector:
    """Collects probabilities and features of a validation, without device synchronization.

    Memory is bounded: at most 16 MB of probabilities, and features of ``points`` images. The images are spread over
    the whole split, because splits are often sorted by class.

    Args:
        expected: Images of the epoch on this rank, if known.
        points: Number of images whose features are collected.
        num_classes: Number of classes.
        rank: Rank of this process, which validates images ``rank, rank + world_size, …`` of the split.
        world_size: Number of ranks.
    """

    def __init__(self, expected: int | None, points: int, num_classes: int, rank: int = 0, world_size: int = 1) -> None:
        images = max(min(MAX_IMAGES, MAX_VALUES // max(num_classes, 1)) // world_size, 1)
        self._rank, self._world_size = rank, world_size
        self._probabilities = _Subsample.spread(expected, images)
        self._features = _Subsample.spread(expected, -(-points // world_size))
        self._count = 0

    def update(self, probabilities: torch.Tensor, features: torch.Tensor) -> None:
        """Add a batch, without padding: probabilities ``(B, C)`` and features ``(B, D)``."""
        self._probabilities.update(probabilities, self._count)
        self._features.update(features, self._count)
        self._count += len(probabilities)

    def compute(self, images: ImagePredictions) -> ValidationPredictions:
        """Combine the collected values with the predictions of the same images."""
        return ValidationPredictions(
            torch.arange(len(images.labels)) * self._world_size + self._rank,
            images.labels,
            images.predicted,
            images.confidence,
            *self._probabilities.compute(),
            *self._features.compute(),
        )


def merge_predictions(per_rank: Sequence[ValidationPredictions]) -> ValidationPredictions:
    """Merge the predictions of all ranks, in the order of the split."""
    offsets = torch.tensor([0, *(len(part) for part in per_rank)]).cumsum(0).tolist()
    indices = torch.cat([part.indices for part in per_rank])
    order = indices.argsort()
    position = torch.empty_like(order)  # inverse permutation
    position[order] = torch.arange(len(order))

    def concatenated(name: str) -> torch.Tensor:
        tensors = [getattr(part, name) for part in per_rank]
        return torch.cat([tensor for tensor in tensors if tensor.numel()] or tensors[:1])

    def positions(name: str) -> torch.Tensor:
        pairs = zip(per_rank, offsets, strict=False)
        return torch.cat([position[getattr(part, name) + offset] for part, offset in pairs])

    return ValidationPredictions(
        indices=indices[order],
        labels=concatenated("labels")[order],
        predicted=concatenated("predicted")[order],
        confidence=concatenated("confidence")[order],
        probability_indices=positions("probability_indices"),
        probabilities=concatenated("probabilities"),
        feature_indices=positions("feature_indices"),
        features=concatenated("features"),
    )
