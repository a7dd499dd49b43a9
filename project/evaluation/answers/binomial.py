"""Exact binomial tests of an error rate."""

from __future__ import annotations

import functools
import math

import numpy as np


def binomial_cdf(errors: int, count: int, rate: float) -> float:
    """Probability of at most so many errors in independent trials.

    Args:
        errors: Number of errors, at least 0.
        count: Number of trials.
        rate: Probability of an error, in (0, 1).
    """
    if errors >= count:
        return 1.0
    drawn = np.arange(errors + 1)
    # The logarithms of count! / (drawn! (count - drawn)!), from ratios of consecutive coefficients.
    ratios = np.log(np.maximum(count - drawn[1:] + 1, 1)) - np.log(np.maximum(drawn[1:], 1))
    logarithms = np.concatenate([[0.0], np.cumsum(ratios)])
    logarithms += drawn * math.log(rate) + (count - drawn) * math.log1p(-rate)
    return min(1.0, float(np.exp(logarithms).sum()))


@functools.lru_cache(1 << 14)  # the sequences of tests repeat the same questions
def trials_to_certify(errors: int, rate: float, delta: float) -> int:
    """Smallest number of trials in which so many errors show a rate of at most ``rate``.

    Args:
        errors: Number of errors, at least 0.
        rate: Error rate to certify, in (0, 1).
        delta: Probability, in (0, 1), of certifying a larger error rate.
    """
    low, high = errors, errors + 1
    while binomial_cdf(errors, high, rate) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if binomial_cdf(errors, middle, rate) > delta else (low, middle)
    return high
