"""Counts of an epoch's answers over all processes: confusion matrix and calibration bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from project.evaluation.metrics import calibration_bins
from project.runtime.distributed import processes

MOST_CLASSES = 100  # for which all confusions are counted: a table of more is mostly zeros


class ImagePredictions(NamedTuple):
    """The answer to each image of an epoch, in this process's order; on the CPU.

    Attributes:
        confidence: Probability of the predicted class, float32 ``(N,)``.
        predicted: That class, int64 ``(N,)``.
        labels: The right class, int64 ``(N,)``.
        in_top5: Whether the right class is among the five most probable, bool ``(N,)``.
    """

    confidence: torch.Tensor
    predicted: torch.Tensor
    labels: torch.Tensor
    in_top5: torch.Tensor


@dataclass(frozen=True)
class ConfusionCounts:
    """Counts of the images of an epoch, of all processes.

    Attributes:
        confusion: Images of each class (row) by predicted class (column), int64 ``(C, C)``. Of more than 100 classes,
            ``(C, 2)``: images of each class, and how many of them are right.
        calibration: Images, summed confidence and correct answers in each bin of confidence, float64 ``(15, 3)``.
        hits: True positives of each class, int64 ``(C,)``.
        support: Images of each class, int64 ``(C,)``.
        predicted: Images predicted as each class, int64 ``(C,)``.
        in_top5: Images whose class is among the five most probable.
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
    def of(cls, each: ImagePredictions, classes: int, device: torch.device) -> ConfusionCounts:
        """Count this process's images, and add the counts of all processes; they call it together.

        Args:
            each: This process's images.
            classes: Number C of classes.
            device: Where processes exchange their counts.
        """
        right = each.predicted == each.labels
        hits, support, predicted = (
            torch.bincount(which, minlength=classes) for which in (each.labels[right], each.labels, each.predicted)
        )
        confusion = torch.stack([support, hits], 1)
        if classes <= MOST_CLASSES:
            pairs = torch.bincount(each.labels * classes + each.predicted, minlength=classes**2)
            confusion = pairs.view(classes, classes)
        parts = [confusion, calibration_bins(each.confidence, right), hits, support, predicted, each.in_top5.sum()]
        if processes() > 1:
            parts = [part.to(device) for part in parts]
            for part in parts:
                dist.all_reduce(part)
        confusion, calibration, hits, support, predicted, in_top5 = (part.cpu() for part in parts)
        return cls(confusion, calibration, hits, support, predicted, int(in_top5))
