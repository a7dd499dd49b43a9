"""Classification metrics, computed from counts."""

from __future__ import annotations

import torch

#: Confidence bins of calibration error and reliability diagrams, as in Guo et al., arXiv:1706.04599.
BINS = 15
#: Above this number of classes, per-class scores are not logged: they would hide the other metrics.
MAX_SCORED_CLASSES = 100


def class_scores(hits: torch.Tensor, support: torch.Tensor, predicted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1 of each class, float32 ``(C,)``.

    Undefined scores are NaN: the precision of a class that is never predicted, and the recall and F1 of a class without
    images.

    Args:
        hits: True positives of each class, int64 ``(C,)``.
        support: Images of each class, int64 ``(C,)``.
        predicted: Images predicted as each class, int64 ``(C,)``.
    """
    recall = hits / support
    f1 = (2 * hits / (support + predicted)).where(support > 0, recall)
    return {"precision": hits / predicted, "recall": recall, "f1": f1}


def macro_f1(hits: torch.Tensor, support: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Mean F1 of the classes that have images, float32; 0 if none has. See :func:`class_scores` for the arguments."""
    return class_scores(hits, support, predicted)["f1"].nanmean().nan_to_num(0.0)


def calibration_bins(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Images, summed confidence and correct predictions per confidence bin, float64 ``(15, 3)``.

    Args:
        confidence: Probability of each predicted class, float ``(N,)``.
        correct: Whether each prediction is correct, bool ``(N,)``.
    """
    confidence = confidence.double().nan_to_num(0.0)  # NaN if training diverged
    bins = (confidence * BINS).long().clamp(max=BINS - 1)  # a confidence of 1 belongs to the last bin
    columns = (torch.ones_like(confidence), confidence, correct.double())
    return torch.stack([torch.bincount(bins, column, BINS) for column in columns], 1).double()  # int64 if N is 0


def calibration_error(bins: torch.Tensor) -> torch.Tensor:
    """Expected calibration error, float32, from :func:`calibration_bins`."""
    images, confidence, correct = bins.unbind(1)
    return ((confidence - correct).abs().sum() / images.sum()).float()
