"""Abstention: the confidence above which at most a stated share of the answers is wrong.

Sources: Y. Geifman and R. El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017,
arXiv:1705.08500; A. N. Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk
control", arXiv:2110.01052 (fixed-sequence testing with several starts).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from project.evaluation.answers.binomial import binomial_cdf, trials_to_certify

#: Probability that the error of the answered images exceeds the stated one.
DELTA = 0.1
#: Numbers of errors that the first test of a sequence allows.
STARTS = (0, 1, 3, 7)
#: Each test allows one error more than the previous one, and about one per cent more from so many errors on.
ONE_PER_CENT = 100


class Abstention(NamedTuple):
    """When to answer.

    Attributes:
        threshold: Smallest confidence that is answered; ``None`` if no error rate can be certified.
        answered: Share of the calibration images that is answered.
        errors: Number of wrong answers among them.
        images: Number of answered calibration images.
        needed: Smallest number of answered images that can certify the error, all of them correct.
    """

    threshold: float | None
    answered: float
    errors: int
    images: int
    needed: int


def certify(confidence: np.ndarray, correct: np.ndarray, max_error: float, delta: float = DELTA) -> Abstention:
    """The lowest confidence at which the error of the answered images is certified.

    With a probability of at least ``1 - delta`` over the calibration images, at most ``max_error`` of the new images
    with this confidence or more are misclassified.

    Thresholds are tested from the highest to the lowest, each with an exact binomial test, until one fails. The
    k-th one answers as many images as k errors can certify, so a single error does not end the sequence at once. If
    there are many images, several sequences start at lower thresholds, and share ``delta``. All depends only on the
    confidences, not on which answers are right.

    Args:
        confidence: Probability of the predicted class of each calibration image, ``(N,)``.
        correct: Whether it is right, bool ``(N,)``.
        max_error: Error rate to certify, in (0, 1).
        delta: Probability that the guarantee does not hold, in (0, 1).
    """
    count = len(confidence)
    starts = max(
        (n for n in range(1, len(STARTS) + 1) if trials_to_certify(STARTS[n - 1], max_error, delta / n) <= count),
        default=1,
    )
    order = np.argsort(-confidence, kind="stable")
    ordered, wrong = confidence[order], (~correct[order]).cumsum()
    best, share = 0, delta / starts
    for start in STARTS[:starts]:
        best = max(best, _last_certified(ordered, wrong, start, max_error, share))
    needed = trials_to_certify(0, max_error, delta)
    if not best:
        return Abstention(None, 0.0, 0, 0, needed)
    return Abstention(float(ordered[best - 1]), best / count, int(wrong[best - 1]), best, needed)


def _last_certified(ordered: np.ndarray, wrong: np.ndarray, errors: int, max_error: float, delta: float) -> int:
    """Number of answered images of the last successful test of a sequence; 0 if its first test fails.

    Args:
        ordered: Confidences in descending order.
        wrong: Number of errors up to each of them.
        errors: Number of errors that the first test allows.
        max_error: See :func:`certify`.
        delta: Level of each test.
    """
    certified, count = 0, len(ordered)
    while certified < count:
        images = trials_to_certify(errors, max_error, delta)
        if images > count:
            if not certified:
                return 0
            images = count  # the last test answers all images
        # Images of equal confidence are answered together.
        images = int(np.searchsorted(-ordered, -ordered[images - 1], "right"))
        if binomial_cdf(int(wrong[images - 1]), images, max_error) > delta:
            return certified
        certified, errors = images, errors + 1 + errors // ONE_PER_CENT
    return certified
