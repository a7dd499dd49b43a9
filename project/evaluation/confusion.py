"""Confusion matrix and calibration bins of an epoch, summed over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from project.evaluation.metrics import calibration_bins
from project.runtime.distributed import world_size

MAX_COUNTED_CLASSES = 100  # with more, the full confusion matrix is not counted: it would be mostly zeros


class ImagePredictions(NamedTuple):
    """Per-image predictions of an epoch on this rank, on the CPU.

    Attributes:
        confidence: Probability of the predicted class, float32 ``(N,)``.
        predicted: Predicted class, int64 ``(N,)``.
        labels: True class, int64 ``(N,)``.
        in_top5: Whether the true class is among the five most probable, bool ``(N,)``.
    """

    confidence: torch.Tensor
    predicted: torch.Tensor
    labels: torch.Tensor
    in_top5: torch.Tensor


def confusion_matrix(labels: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Images by true class (row) and predicted class (column), int64 ``(C, C)``."""
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes)


def class_counts(
    labels: torch.Tensor, predicted: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """True positives, support and predicted count of each class, int64 ``(C,)`` each."""
    hits, support, predictions = (
        torch.bincount(indices, minlength=num_classes) for indices in (labels[labels == predicted], labels, predicted)
    )
    return hits, support, predictions


@dataclass(frozen=True)
class ConfusionCounts:
    """Counts of the images of an epoch, summed over all ranks.

    Attributes:
        confusion: Images by true class (row) and predicted class (column), int64 ``(C, C)``. For more than 100
            classes, ``(C, 2)``: support and true positives of each class.
        calibration: Images, summed confidence and correct predictions per confidence bin, float64 ``(15, 3)``.
        hits: True positives of each class, int64 ``(C,)``.
        support: Images of each class, int64 ``(C,)``.
        predicted: Images predicted as each class, int64 ``(C,)``.
        in_top5: Images whose true class is among the five most probable.
    """

    confusion: torch.Tensor
    calibration: torch.Tensor
    hits: torch.Tensor
    support: torch.Tensor
    predicted: torch.Tensor
    in_top5: int

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.support.sum())

    @classmethod
    def of(cls, images: ImagePredictions, num_classes: int, device: torch.device) -> ConfusionCounts:
        """Count this rank's images and sum over ranks. Collective: all ranks must call it.

        Args:
            images: Predictions of this rank.
            num_classes: Number C of classes.
            device: Device of the collective.
        """
        hits, support, predicted = class_counts(images.labels, images.predicted, num_classes)
        if num_classes <= MAX_COUNTED_CLASSES:
            confusion = confusion_matrix(images.labels, images.predicted, num_classes)
        else:
            confusion = torch.stack([support, hits], 1)
        calibration = calibration_bins(images.confidence, images.predicted == images.labels)
        counts = [confusion, calibration, hits, support, predicted, images.in_top5.sum()]
        if world_size() > 1:
            counts = [count.to(device) for count in counts]
            for count in counts:
                dist.all_reduce(count)
        confusion, calibration, hits, support, predicted, in_top5 = (count.cpu() for count in counts)
        return cls(confusion, calibration, hits, support, predicted, int(in_top5))
