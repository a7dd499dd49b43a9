"""The answer for one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from project.evaluation.answers.policy import Answered


class Answer(NamedTuple):
    """A prediction, and how far to rely on it. What was not asked for is ``None``.

    Attributes:
        label: The predicted class.
        probability: Its calibrated probability.
        known: Whether the image resembles the training images.
        classes: Classes that contain the right one with the stated coverage, the most probable one first.
        answered: Whether the prediction is certain enough for the stated error.
    """

    label: str
    probability: float
    known: bool | None = None
    classes: list[str] | None = None
    answered: bool | None = None


def answers_of(answered: Answered, labels: Sequence[str], classes: Sequence[str]) -> list[Answer]:
    """The answer of each image.

    Args:
        answered: Of N images.
        labels: Predicted class of each image.
        classes: Class names.
    """
    order = np.argsort(-answered.probabilities, axis=1, kind="stable")
    return [
        Answer(
            label,
            float(answered.probabilities[index].max()),
            None if answered.known is None else bool(answered.known[index]),
            None if answered.sets is None else [classes[k] for k in order[index] if answered.sets[index, k]],
            None if answered.answered is None else bool(answered.answered[index]),
        )
        for index, label in enumerate(labels)
    ]
