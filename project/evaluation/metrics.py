"""Metrics of a classifier from counts of its answers: one pass over the images, and every score derived from it."""

from __future__ import annotations

import torch

#: Bins of confidence, of the calibration error and of every reliability table: as Guo et al., arXiv:1706.04599, have.
BINS = 15
#: Above this number of classes, a curve for each would bury the others.
MOST_CURVES = 100


def class_scores(hits: torch.Tensor, support: torch.Tensor, predicted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Precision, recall and F1 of each class, float32 ``(C,)``.

    What is undefined is not a number: the precision of a class that is never predicted, and the recall and the F1 of
    one that has no image.

    Args:
        hits: True positives of each class, int64 ``(C,)``.
        support: Images of each class, int64 ``(C,)``.
        predicted: Images predicted as each class, int64 ``(C,)``.
    """
    recall = hits / support
    f1 = (2 * hits / (support + predicted)).where(support > 0, recall)
    return {"precision": hits / predicted, "recall": recall, "f1": f1}


def macro_f1(hits: torch.Tensor, support: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Mean F1 of the classes that have an image, float32; 0 where none has.

    Args:
        hits: True positives of each class, int64 ``(C,)``.
        support: Images of each class, int64 ``(C,)``.
        predicted: Images predicted as each class, int64 ``(C,)``.
    """
    return class_scores(hits, support, predicted)["f1"].nanmean().nan_to_num(0.0)


def calibration_bins(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Images, summed confidence and correct answers in each bin of confidence, float64 ``(15, 3)``.

    Args:
        confidence: Probability of each answer, float ``(N,)``.
        correct: Whether it is right, bool ``(N,)``.
    """
    sure = confidence.double().nan_to_num(0.0)  # of a network that has diverged
    bins = (sure * BINS).long().clamp(max=BINS - 1)  # a confidence of 1 belongs to the last bin
    columns = [torch.bincount(bins, each, BINS) for each in (torch.ones_like(sure), sure, correct.double())]
    return torch.stack(columns, 1).double()  # of no images, bincount gives integers


def calibration_error(bins: torch.Tensor) -> torch.Tensor:
    """Expected calibration error, float32, of bins as :func:`calibration_bins` gives them."""
    images, sure, right = bins.unbind(1)
    return ((sure - right).abs().sum() / images.sum()).float()
