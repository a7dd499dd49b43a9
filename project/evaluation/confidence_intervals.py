"""How far a figure measured on some images may lie from what it would be on all."""

from __future__ import annotations

import math

import numpy as np

LEVEL = 0.95
_DEVIATIONS = 1.959963984540054  # of the normal distribution, between which that share of it lies
DRAWS = 1000
SEED = 0  # the same counts give the same interval

Interval = tuple[float, float]


def wilson(successes: float, count: int) -> Interval:
    """The 95 % interval of a share, by its score.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the
    American Statistical Association 22 (1927). Unlike the textbook's normal approximation, it holds for small counts
    and for shares near 0 and 1.

    Args:
        successes: How many of them.
        count: How many there are, more than 0.
    """
    share, square = successes / count, _DEVIATIONS**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = _DEVIATIONS * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean over classes of the F1 score, of confusion matrices ``(..., C, C)``, rows the true classes: ``(...)``.

    A class without an image does not count.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    wrong_and_right = confusion.sum(-1) + confusion.sum(-2)
    known = confusion.sum(-1) > 0
    scores = np.divide(2.0 * right, wrong_and_right, out=np.zeros(right.shape), where=known)
    mean: np.ndarray = scores.sum(-1) / np.maximum(known.sum(-1), 1)
    return mean


def bootstrap_f1(confusion: np.ndarray) -> Interval:
    """The 95 % interval of the macro F1 score, from percentiles of the bootstrap over images.

    To draw images with replacement is to draw cells of the confusion matrix, which is all that F1 knows of them.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).

    Args:
        confusion: Counts ``(C, C)``, rows the true classes.
    """
    count = int(confusion.sum())
    cells = np.flatnonzero(confusion)
    shares = confusion.ravel()[cells] / count
    generator = np.random.default_rng(SEED)
    drawn = np.zeros((1, *confusion.shape))
    scores = np.empty(DRAWS)
    for draw in range(DRAWS):  # one by one: all at once, 100 classes would take 80 MB
        drawn.reshape(-1)[cells] = generator.multinomial(count, shares)
        scores[draw] = macro_f1(drawn)[0]
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
