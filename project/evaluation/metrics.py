"""The metrics of a classifier, as torchmetrics collections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassStatScores,
)

from project.data.samplers import IGNORED

#: Labels are indices of classes by construction; to look each time would cost more than the metric.
LABELS: dict[str, Any] = {"validate_args": False, "ignore_index": IGNORED}
#: Above this number of classes, a curve for each would bury the others.
MOST_CURVES = 100


def scores(hits: torch.Tensor, had: torch.Tensor, got: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1 of each class, float32 ``(C,)``; 0 where there is nothing to divide by.

    Args:
        hits: How many images of each class were recognised, ``(C,)``.
        had: How many there are.
        got: How many images were taken for it.
    """
    found = {"precision": hits / got, "recall": hits / had, "f1": 2 * hits / (had + got)}
    return {name: values.nan_to_num(0.0) for name, values in found.items()}


class EachClass(MulticlassStatScores):
    """Precision, recall and F1 of each class, by name; 0 where there is nothing to divide by.

    One metric, whose counts are those of the macro F1, so that a collection counts once for both.

    Args:
        classes: Names of the classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(len(classes), average="none", **LABELS)
        self._classes = tuple(classes)

    def compute(self) -> Any:
        """The values, such as ``recall_of/ants``."""
        hits, wrong, _, _, had = super().compute().unbind(-1)
        return {
            f"{name}_of/{which}": value
            for name, each in scores(hits, had, hits + wrong).items()
            for which, value in zip(self._classes, each, strict=True)
        }


def training_metrics(num_classes: int) -> MetricCollection:
    """Accuracy alone: cheap, and enough to see over-fitting by.

    Args:
        num_classes: Number C of classes.
    """
    return MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro", **LABELS)}, prefix="train/")


def evaluation_metrics(classes: Sequence[str], stage: str) -> MetricCollection:
    """Accuracy, macro F1, calibration error, top-5 of more than five classes, scores of each class.

    The expected calibration error is that of Guo et al., arXiv:1706.04599, with 15 bins.

    Args:
        classes: Names of the classes.
        stage: ``val`` or ``test``, which the names of the metrics begin with.

    Returns:
        A collection that takes probabilities ``(B, C)``, float, and labels ``(B,)``, int64, of which those of padding
        are ignored.
    """
    count = len(classes)
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": MulticlassAccuracy(count, average="micro", **LABELS),
        "f1": MulticlassF1Score(count, average="macro", **LABELS),
        "ece": MulticlassCalibrationError(count, n_bins=15, norm="l1", **LABELS),
    }
    if count > 5:
        metrics["top5"] = MulticlassAccuracy(count, average="micro", top_k=5, **LABELS)
    if count <= MOST_CURVES:
        metrics["each"] = EachClass(classes)
    return MetricCollection(metrics, prefix=f"{stage}/")
