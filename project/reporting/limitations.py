"""What a fit's own figures say about where not to rely on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from project.evaluation.confidence_intervals import wilson
from project.evaluation.summary import EvaluationSummary

FEW = 10  # validation images of a class, of which nobody can tell much
UNEVEN = 3.0  # times more images of one class than of another
SHOWN = 3  # names


def limits(
    scores: EvaluationSummary | None, classes: Sequence[str], counts: Mapping[str, Sequence[int]], epochs: int
) -> list[str]:
    """Sentences, the most important first.

    Args:
        scores: What was measured.
        classes: Their names.
        counts: Images of each class, by split.
        epochs: From how many the best one was chosen.
    """
    found: list[str] = []
    if scores is not None:
        if epochs > 1:
            found.append(
                f"The validation images chose the best of {epochs} epochs, so their figures are optimistic. Those of "
                "images that had no part in it are had with python -m project test, where some are held out for it."
            )
        found += [*_width(scores), *_per_class(scores, classes), *_confused(scores, classes), *_certainty(scores)]
    train = counts["train"]
    most, least = max(range(len(train)), key=train.__getitem__), min(range(len(train)), key=train.__getitem__)
    if train[least] and train[most] / train[least] >= UNEVEN:
        found.append(
            f"Classes are uneven: {train[most]:,} training images of {classes[most]}, {train[least]:,} of "
            f"{classes[least]}. Accuracy counts images, so it says most about the large ones; macro F1 counts classes."
        )
    return found


def _width(scores: EvaluationSummary) -> list[str]:
    if not scores.images or "val/accuracy" not in scores.metrics:
        return []
    low, high = wilson(scores.metrics["val/accuracy"] * scores.images, scores.images)
    images = images_of(scores.images, "validation ")
    return [f"From {images}, the accuracy may be from {100 * low:.1f} % to {100 * high:.1f} %."]


def _per_class(scores: EvaluationSummary, classes: Sequence[str]) -> list[str]:
    if scores.per_class is None:
        return []
    right, count = scores.per_class
    there = [at for at in range(len(count)) if count[at]]
    shares, mean = right / np.maximum(count, 1), right.sum() / max(count.sum(), 1)
    worst = sorted((at for at in there if shares[at] < mean), key=lambda at: (shares[at], -count[at]))
    found = []
    if worst:
        named = ", ".join(f"{classes[at]} ({int(right[at])} of {int(count[at])})" for at in worst[:SHOWN])
        others = sum(shares[at] == shares[worst[SHOWN - 1]] for at in worst[SHOWN:])
        found.append(f"Recognised least: {named}{f', and {others} more as seldom' if others else ''}.")
    few = [classes[at] for at in there if count[at] < FEW]
    if few:
        more = f" and {len(few) - SHOWN} more" if len(few) > SHOWN else ""
        found.append(f"Fewer than {FEW} validation images of {', '.join(few[:SHOWN])}{more}: little is known of these.")
    absent = [classes[at] for at in range(len(count)) if not count[at]]
    if absent:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        found.append(f"No validation image of {', '.join(absent[:SHOWN])}{more}: nothing is known of these.")
    return found


def _confused(scores: EvaluationSummary, classes: Sequence[str]) -> list[str]:
    if scores.confusion is None or len(set(scores.confusion.shape)) != 1:
        return []
    wrong = scores.confusion - np.diag(np.diagonal(scores.confusion))
    worst = [int(at) for at in np.argsort(-wrong, axis=None, kind="stable") if wrong.flat[at]]
    if not worst:
        return []
    pairs = [(*divmod(at, len(classes)), int(wrong.flat[at])) for at in worst[:SHOWN]]
    named = ", ".join(f"{classes[true]} for {classes[told]} ({images_of(times)})" for true, told, times in pairs)
    others = sum(wrong.flat[at] == pairs[-1][2] for at in worst[SHOWN:])
    return [f"Mistaken most often: {named}{f', and {others} other pairs as often' if others else ''}."]


def _certainty(scores: EvaluationSummary) -> list[str]:
    if scores.calibration is None or not scores.calibration[:, 0].sum():
        return []
    images, sure, right = scores.calibration.sum(0)
    gap = (sure - right) / images
    if abs(gap) < 0.02:
        return []
    less = "more" if gap > 0 else "less"
    return [
        f"Its probabilities are {less} certain than they should be: {100 * sure / images:.1f} % on average, while "
        f"{100 * right / images:.1f} % of the predictions are right."
    ]


def images_of(count: int, kind: str = "") -> str:
    """A number of images in words."""
    return f"{count:,} {kind}image{'' if count == 1 else 's'}"
