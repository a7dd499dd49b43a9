"""95 % confidence intervals of the difference between two models on the same images."""

from __future__ import annotations

import math

import numpy as np
import torch

from project.evaluation.confidence_intervals import Interval, Z, wilson


def newcombe_paired(first: np.ndarray, second: np.ndarray) -> Interval:
    """Interval of the difference of two accuracies on the same images.

    It combines the Wilson intervals of both accuracies with the correlation of the two models. It is accurate for few
    images, and it has a width where the models agree on all images.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998), method 10.

    Args:
        first: Whether the first model classifies each image correctly, bool ``(N,)``, N more than 0.
        second: The same of the second model.

    Returns:
        Limits of the first accuracy minus the second.
    """
    count = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    successes = both + only_first, both + only_second
    (low, high), (other_low, other_high) = (wilson(number, count) for number in successes)
    share, other_share = (number / count for number in successes)
    margins = math.prod(number * (count - number) for number in successes)
    covariance: float = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - count / 2, 0)
    correlation = covariance / math.sqrt(margins) if margins else 0.0

    def spread(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    difference = share - other_share
    below, above = spread(share - low, other_high - other_share), spread(high - share, other_share - other_low)
    return difference - below, difference + above


def paired_difference(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Mean difference of two scores of the same images ``(N,)``, and half the width of its 95 % interval.

    The interval is the normal approximation for the given models: it does not include the variation between trainings.
    For the accuracy of few images, use :func:`newcombe_paired`.
    """
    difference = first.double() - second.double()
    return float(difference.mean()), Z * float(difference.std()) / len(difference) ** 0.5
