"""The metrics of a classifier, as torchmetrics collections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchmetrics import ClasswiseWrapper, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from project.padding import IGNORED

#: Labels are indices of classes by construction; to look each time would cost more than the metric.
LABELS: dict[str, Any] = {"validate_args": False, "ignore_index": IGNORED}
#: Above this number of classes, a curve for each would bury the others.
MOST_CURVES = 100


def training_metrics(num_classes: int) -> MetricCollection:
    """Accuracy alone: cheap, and enough to see over-fitting by.

    Args:
        num_classes: Number C of classes.
    """
    return MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro", **LABELS)}, prefix="train/")


def evaluation_metrics(classes: Sequence[str], stage: str) -> MetricCollection:
    """Accuracy, macro F1, calibration error, top-5 where there are more than five classes, accuracy of each class.

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
        metrics["each"] = ClasswiseWrapper(
            MulticlassAccuracy(count, average="none", **LABELS), labels=list(classes), prefix="accuracy_of/"
        )
    return MetricCollection(metrics, prefix=f"{stage}/")
