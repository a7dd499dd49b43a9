"""Columns of a CSV file for the answers of a classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from project.classifier import ImageClassifier
from project.errors import ConfigError
from project.evaluation.answers.calibration import require_fractions
from project.evaluation.answers.policy import Answered, AnswerPolicy

SEPARATOR = "|"  # of the classes of a set


@dataclass(frozen=True)
class AnswerLimits:
    """What is asked of the answers; the names are those of the flags.

    Attributes:
        coverage: Probability that a set contains the right class; ``None`` for no column ``set``.
        max_error: Largest share of wrong answers; ``None`` for no column ``answered``.
        false_alarms: Largest share of images of known classes that are called unknown; ``None`` for no column
            ``known``.
    """

    coverage: float | None = None
    max_error: float | None = None
    false_alarms: float | None = None

    def require_fractions(self) -> None:
        """Check the limits before weights are loaded.

        Raises:
            ConfigError: A limit is not between 0 and 1.
        """
        with _as_flags():
            require_fractions(**vars(self))

    @property
    def columns(self) -> list[str]:
        """Names of the columns; empty if nothing is asked for."""
        limits = {"known": self.false_alarms, "set": self.coverage, "answered": self.max_error}
        names = [name for name, limit in limits.items() if limit is not None]
        return ["calibrated_probability", *names] if names else []

    def policy(self, module: ImageClassifier) -> AnswerPolicy | None:
        """The policy of a classifier; ``None`` if nothing is asked for.

        Raises:
            ConfigError: The classifier has no calibrated answers, or they do not permit a limit.
        """
        if not self.columns:
            return None
        with _as_flags():
            policy = module.make_policy(**vars(self))
        unclear = [name for name in module.classes if SEPARATOR in name]
        if self.coverage is not None and unclear:
            raise ConfigError(
                f"--coverage: the class {unclear[0]!r} contains {SEPARATOR}, which separates the classes of a set.\n"
                "Rename the class, or use load(...).answer(...) in Python."
            )
        return policy

    def cells(self, answers: Answered, classes: Sequence[str]) -> list[list[str]]:
        """Cells of each image, one for each of :attr:`columns`."""
        columns = [[f"{value:.6f}" for value in answers.probabilities.max(1)]]
        if answers.known is not None:
            columns.append(_yes_or_no(answers.known))
        if answers.sets is not None:
            columns.append(
                [
                    SEPARATOR.join(classes[label] for label in np.flatnonzero(members).tolist())
                    for members in answers.sets
                ]
            )
        if answers.answered is not None:
            columns.append(_yes_or_no(answers.answered))
        return [list(cells) for cells in zip(*columns, strict=True)]


@contextlib.contextmanager
def _as_flags() -> Iterator[None]:
    """Name the flag in an error, whose message begins with the name of a limit."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


def _yes_or_no(values: np.ndarray) -> list[str]:
    return ["yes" if value else "no" for value in values]
