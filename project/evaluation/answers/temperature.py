"""Temperature scaling: one number that makes probabilities agree with frequencies.

Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv:1706.04599.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from project.evaluation.confidence_intervals import DRAWS, LEVEL, SEED, Interval
from project.evaluation.metrics import BINS

#: Temperatures that are searched.
LOWEST, HIGHEST = 0.05, 20.0
STEPS = 60  # at most, of Newton's method; about 8 are taken
PRECISION = 1e-9  # relative
DRAWS_AT_ONCE = 100  # resamples: bounds the memory
SMALLEST = 1e-30  # a probability of 0 has no logarithm
FOLDS = 5  # of cross-fitting


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    interval: Interval


class CalibrationReport(NamedTuple):
    """Calibration before and after temperature scaling, on images that did not fit the temperature.

    Attributes:
        images: Number of images.
        before: Negative log-likelihood ``nll``, Brier score ``brier`` and expected calibration error ``ece``.
        after: The same with the temperature.
    """

    images: int
    before: dict[str, Estimate]
    after: dict[str, Estimate]


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities ``(N, C)`` at a temperature, float64; the order of the classes does not change.

    Dividing the logits of a softmax by T raises its probabilities to the power 1 / T, up to a factor.
    """
    logarithms = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST)) / temperature
    powers = np.exp(logarithms - logarithms.max(1, keepdims=True))
    values: np.ndarray = powers / powers.sum(1, keepdims=True)
    return values


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the smallest negative log-likelihood of the images and of two more.

    The probabilities of these two are an average over the images. The first one is of the most probable class, and the
    second one of the second most probable class. Without them, a classifier that misclassifies no calibration image
    gets the lowest temperature, and so a probability near 1 for all new images (rule of succession; J. Platt,
    "Probabilistic outputs for support vector machines", 1999, has such targets, too).

    The likelihood is a convex function of 1 / T, so Newton's method with bisection finds its minimum.

    Args:
        probabilities: ``(N, C)``, float.
        labels: True classes, int ``(N,)``.
    """
    logarithms = np.log(np.maximum(probabilities.astype(np.float64), SMALLEST))
    first_two = np.sort(logarithms, axis=1)[:, -2:]
    weight = 1 + 2 / len(labels)
    target = float(logarithms[np.arange(len(labels)), labels].sum() + first_two.sum() / len(labels))

    def derivatives(inverse: float) -> tuple[float, float]:
        """First and second derivative of the summed negative log-likelihood with respect to 1 / T."""
        values = inverse * logarithms
        values -= values.max(1, keepdims=True)
        np.exp(values, out=values)
        values /= values.sum(1, keepdims=True)
        mean = np.einsum("nc,nc->n", values, logarithms)
        square = np.einsum("nc,nc,nc->n", values, logarithms, logarithms)
        return weight * float(mean.sum()) - target, weight * float((square - mean**2).sum())

    low, high, inverse = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(STEPS):
        slope, curvature = derivatives(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        newton = inverse - slope / curvature if curvature > 0 else low
        before, inverse = inverse, newton if low < newton < high else (low + high) / 2
        if abs(inverse - before) <= PRECISION * before:
            break
    return 1 / inverse


def cross_fitted(probabilities: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Probabilities ``(N, C)``, each at the temperature that the images of the other folds fit.

    Args:
        probabilities: ``(N, C)``.
        labels: True classes, int ``(N,)``.
        folds: Fold of each image, int ``(N,)``.
    """
    values = np.empty(probabilities.shape, np.float64)
    for fold in np.unique(folds):
        held_out = folds == fold
        values[held_out] = scaled(probabilities[held_out], fit_temperature(probabilities[~held_out], labels[~held_out]))
    return values


def random_folds(count: int, folds: int = FOLDS) -> np.ndarray:
    """Fold of each of so many images, int64 ``(N,)``: random, of equal size, and always the same."""
    return np.random.default_rng(SEED).permutation(np.arange(count) % folds)


def calibration_scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    """Negative log-likelihood, Brier score and expected calibration error, with 95 % intervals.

    The intervals are basic bootstrap intervals over images (Davison and Hinkley, "Bootstrap methods and their
    application", 1997, section 5.2). The calibration error is that of
    :func:`~project.evaluation.metrics.calibration_error`. It is positive also for calibrated predictions: its interval
    begins at 0 if predictions of these confidences that are right by chance with the stated probability have as large
    an error (consistency resampling; Bröcker and Smith, "Increasing the reliability of reliability diagrams", 2007).

    Args:
        probabilities: ``(N, C)``.
        labels: True classes, int ``(N,)``.
    """
    exact = probabilities.astype(np.float64)
    true = exact[np.arange(len(labels)), labels]
    likelihood = -np.log(np.maximum(true, SMALLEST))
    brier = (exact**2).sum(1) - 2 * true + 1  # the squared distance from the one-hot target
    confidence = exact.max(1)
    correct = (exact.argmax(1) == labels).astype(np.float64)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    generator, every = np.random.default_rng(SEED), np.arange(len(labels))

    def errors(drawn: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Calibration error of several samples: images ``(S, N)``, and whether each is right; ``(S,)``."""
        cells = (np.arange(len(drawn))[:, None] * BINS + bins[drawn]).ravel()
        sums = np.bincount(cells, (confidence[drawn] - right).ravel(), len(drawn) * BINS)
        means: np.ndarray = np.abs(sums.reshape(-1, BINS)).sum(1) / drawn.shape[1]
        return means

    parts: dict[str, list[np.ndarray]] = {"nll": [], "brier": [], "ece": [], "calibrated": []}
    for _ in range(DRAWS // DRAWS_AT_ONCE):
        drawn = generator.integers(0, len(labels), (DRAWS_AT_ONCE, len(labels)))
        chance = generator.random(drawn.shape) < confidence  # predictions of these confidences, were they calibrated
        parts["nll"].append(likelihood[drawn].mean(1))
        parts["brier"].append(brier[drawn].mean(1))
        parts["ece"].append(errors(drawn, correct[drawn]))
        parts["calibrated"].append(errors(np.broadcast_to(every, drawn.shape), chance))
    draws = {name: np.concatenate(values) for name, values in parts.items()}
    error = float(errors(every[None], correct[None])[0])
    low, high = _basic_interval(error, draws["ece"])
    if error <= np.quantile(draws["calibrated"], (1 + LEVEL) / 2):
        low = 0.0
    return {
        "nll": Estimate(float(likelihood.mean()), _basic_interval(float(likelihood.mean()), draws["nll"])),
        "brier": Estimate(float(brier.mean()), _basic_interval(float(brier.mean()), draws["brier"])),
        "ece": Estimate(error, (low, high)),
    }


def _basic_interval(value: float, draws: np.ndarray) -> Interval:
    """Basic bootstrap interval of a score that is at least 0, given its value in resamples."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return max(0.0, 2 * value - float(high)), max(0.0, 2 * value - float(low))


def calibration_report(probabilities: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> CalibrationReport:
    """Compare the calibration without and with a cross-fitted temperature; see :func:`cross_fitted`."""
    after = cross_fitted(probabilities, labels, folds)
    return CalibrationReport(len(labels), calibration_scores(probabilities, labels), calibration_scores(after, labels))
