"""Columns of a table of predictions, and the values of an image in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from project.classifier import ImageClassifier
from project.errors import ConfigError
from project.evaluation.answers.calibration import require_fractions
from project.evaluation.answers.policy import Answered, AnswerPolicy

SEPARATOR = "|"  # of the classes of a set, in CSV
DIGITS = 6  # of a probability
Value = str | float | bool | list[str] | None


class Column(NamedTuple):
    """A column.

    Attributes:
        name: Its name.
        kind: What its values are: text, numbers, true or false, or lists of text. Each may also be missing.
    """

    name: str
    kind: Literal["text", "number", "flag", "list"] = "text"


PATH, ERROR = Column("path"), Column("error")
#: Columns of a task.
CLASSES = (
    *(Column("predicted"), Column("probability", "number")),
    *(Column("top2"), Column("top2_probability", "number")),
    *(Column("top3"), Column("top3_probability", "number")),
)


def most_probable(classes: Sequence[str], probabilities: torch.Tensor) -> Iterator[list[Value]]:
    """Values of each image in :data:`CLASSES`, given probabilities ``(B, C)``."""
    best = probabilities.topk(min(3, probabilities.shape[1]))
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        pairs = zip(values, indices, strict=True)
        cells: list[Value] = [cell for value, index in pairs for cell in (classes[index], round(value, DIGITS))]
        yield cells + [None] * (len(CLASSES) - len(cells))


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
    def columns(self) -> list[Column]:
        """The columns; none if nothing is asked for."""
        limits = {
            Column("known", "flag"): self.false_alarms,
            Column("set", "list"): self.coverage,
            Column("answered", "flag"): self.max_error,
        }
        columns = [column for column, limit in limits.items() if limit is not None]
        return [Column("calibrated_probability", "number"), *columns] if columns else []

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

    def values(self, answers: Answered, classes: Sequence[str]) -> list[list[Value]]:
        """Values of each image, one for each of :attr:`columns`."""
        columns: list[list[Value]] = [[round(float(value), DIGITS) for value in answers.probabilities.max(1)]]
        if answers.known is not None:
            columns.append(answers.known.tolist())
        if answers.sets is not None:
            columns.append([[classes[label] for label in np.flatnonzero(members).tolist()] for members in answers.sets])
        if answers.answered is not None:
            columns.append(answers.answered.tolist())
        return [list(values) for values in zip(*columns, strict=True)]


@contextlib.contextmanager
def _as_flags() -> Iterator[None]:
    """Name the flag in an error, whose message begins with the name of a limit."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
