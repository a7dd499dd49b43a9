"""95 % confidence intervals of accuracy and F1."""

from __future__ import annotations

import math

import numpy as np
import torch

from project.evaluation.metrics import macro_f1

LEVEL = 0.95
Z = 1.959963984540054  # quantile of the normal distribution for LEVEL, two-sided
DRAWS = 1000
SEED = 0  # the same counts give the same interval

Interval = tuple[float, float]


def wilson(successes: float, count: float) -> Interval:
    """Wilson score interval of a proportion, which is accurate for small counts and near 0 and 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927).

    Args:
        successes: Number of successes.
        count: Number of trials, more than 0.
    """
    share, square = successes / count, Z**2
    center = (share + square / (2 * count)) / (1 + square / count)
    spread = Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, center - spread), min(1.0, center + spread)


def bootstrap_f1(confusion: np.ndarray) -> Interval:
    """Percentile bootstrap interval of the macro F1 score, over images.

    F1 depends only on the confusion matrix, so resampling images equals drawing its cells from a multinomial.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).

    Args:
        confusion: Counts ``(C, C)``, rows the true classes.
    """
    count = int(confusion.sum())
    cells = np.flatnonzero(confusion)
    shares = confusion.ravel()[cells] / count
    generator = np.random.default_rng(SEED)
    resampled = np.zeros(confusion.shape, np.int64)
    scores = np.empty(DRAWS)
    for draw in range(DRAWS):  # one at a time: for 100 classes, all draws together would take 80 MB
        resampled.reshape(-1)[cells] = generator.multinomial(count, shares)
        counts = np.diagonal(resampled).copy(), resampled.sum(1), resampled.sum(0)
        scores[draw] = macro_f1(*map(torch.from_numpy, counts))
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
