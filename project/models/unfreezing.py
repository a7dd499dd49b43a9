"""Staged unfreezing: which stages of a backbone a fit trains in which epoch, and the warm-up of new ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch.optim import Optimizer

from project.errors import ConfigError
from project.models.cut import Cut
from project.models.schedules import warm_up_factor

PATIENCE = 2  # validations without improvement after which the next entry of a list begins
WARMUP = 0.1  # epochs


@dataclass(frozen=True)
class UnfreezingSchedule:
    """The cuts of a fit, one after the other: gradual unfreezing (Howard and Ruder, arXiv:1801.06146). Immutable.

    Attributes:
        cuts: At least two, each with more trainable stages than the one before.
        epochs: Number of epochs after which each cut begins; ``None`` if it begins when val/loss does not improve.
        patience: Number of validations without improvement after which the next cut begins; ``None`` with epochs.
    """

    cuts: tuple[Cut, ...]
    epochs: tuple[int, ...] | None
    patience: int | None = None

    @classmethod
    def parse(
        cls,
        entries: Mapping[int, str] | Sequence[str],
        patience: int | None,
        cut_at: Callable[[str, str], Cut],
    ) -> UnfreezingSchedule:
        """Create a schedule from settings.

        Args:
            entries: First trainable stages, by the number of epochs after which they begin, or a list.
            patience: See :attr:`patience`; by default 2 for a list.
            cut_at: Creates the cut before a stage, from its name and the name of the setting.

        Raises:
            ConfigError: The entries or the patience are invalid.
            ModelError: A stage does not exist.
        """
        epochs = tuple(entries) if isinstance(entries, Mapping) else None
        names = [*entries.values()] if isinstance(entries, Mapping) else [*entries]
        cuts = tuple(cut_at(str(name), "model.schedule") for name in names)
        if len(cuts) < 2:
            raise ConfigError(
                f"model.schedule has {'one entry' if cuts else 'no entries'}, and the cut moves only from one to the "
                f"next. Add entries, or use --model.trainable {names[0] if names else 'head'}."
            )
        for number in range(1, len(cuts)):
            if not set(cuts[number - 1].trainable) < set(cuts[number].trainable):
                raise ConfigError(
                    f"model.schedule: {names[number]} after {names[number - 1]} trains no more stages than before, and "
                    "trained stages cannot be frozen again. List the stages from the head towards the input."
                )
        if epochs is None:
            patience = PATIENCE if patience is None else patience
            if patience < 1:
                raise ConfigError(f"model.schedule_patience must be at least 1, not {patience}.")
        elif patience is not None:
            raise ConfigError(
                "model.schedule_patience has no effect, because model.schedule names epochs. Remove it, or list only "
                f"the stages: [{', '.join(map(str, names))}]."
            )
        elif epochs[0] != 0:
            raise ConfigError(f"model.schedule: the first entry must begin after 0 epochs, not {epochs[0]}.")
        elif any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
            raise ConfigError(f"model.schedule: the epochs must increase, not {', '.join(map(str, epochs))}.")
        return cls(cuts, epochs, patience)

    def validate_length(self, epochs: int | None, limit: str = "max_epochs") -> None:
        """Check that each cut begins within a fit.

        Args:
            epochs: Number of epochs of the fit; ``None``, 0 or negative if nothing is trained or it is unknown.
            limit: The trainer's setting that limits it.

        Raises:
            ConfigError: A cut would never begin.
        """
        if self.epochs is not None and epochs is not None and 0 < epochs <= self.epochs[-1]:
            begin = f"{entry_name(self.cuts[-1])} would begin after {format_epochs(self.epochs[-1])}"
            raise ConfigError(f"model.schedule: {begin}, but the fit has {epochs}. Increase --trainer.{limit}.")

    def cut_in(self, epoch: int) -> Cut | None:
        """The cut of an epoch, counted from 0; ``None`` if it depends on val/loss."""
        if self.epochs is None:
            return None
        return self.cuts[max(number for number, first in enumerate(self.epochs) if first <= epoch)]

    def after(self, cut: Cut) -> Cut:
        """The cut that follows another one; the last one if there is none."""
        return self.cuts[min(self.cuts.index(cut) + 1, len(self.cuts) - 1)]

    def __str__(self) -> str:
        names = [entry_name(cut) for cut in self.cuts]
        if self.epochs is None:
            count = f"{self.patience} validation{'' if self.patience == 1 else 's'}"
            return f"{', then '.join(names)}; each begins after {count} without a lower val/loss"
        later = zip(names[1:], self.epochs[1:], strict=True)
        return ", ".join([names[0], *(f"{name} after {format_epochs(first)}" for name, first in later)])


def plain_entries(
    entries: Mapping[int | str, str | int] | Sequence[str | int] | None,
) -> dict[int, str] | list[str] | None:
    """The entries of a schedule in plain types. The command line writes epochs as strings.

    Raises:
        ConfigError: A number of epochs is not an integer.
    """
    if isinstance(entries, Mapping):
        return {_epochs(epoch): str(name) for epoch, name in entries.items()}
    return None if entries is None else [*map(str, entries)]


def _epochs(value: object) -> int:
    if type(value) is not int and not (isinstance(value, str) and value.removeprefix("-").isdecimal()):
        raise ConfigError(
            f"model.schedule: {value} is not a number of epochs. Use integers, as in {{0: head, 3: layer4}}."
        )
    return int(value)


def format_epochs(count: int) -> str:
    """A number of epochs, for a message."""
    return f"{count} epoch{'' if count == 1 else 's'}"


def entry_name(cut: Cut) -> str:
    """How settings name a cut: its first trainable stage, or ``head``."""
    return cut.trainable[0] if cut.trainable else "head"


class WarmUp(NamedTuple):
    """Linear warm-up of a stage (Goyal et al., arXiv:1706.02677): its first steps have lower learning rates.

    Attributes:
        first: Number of the stage's first optimizer step.
        steps: Length of the warm-up.
    """

    first: int
    steps: int

    @classmethod
    def of_epochs(cls, epochs: float, first: int, steps_per_epoch: float) -> WarmUp:
        """Create the warm-up of a stage.

        Args:
            epochs: Length of the warm-up in epochs.
            first: Number of the stage's first optimizer step.
            steps_per_epoch: Number of optimizer steps of an epoch; it may be infinite if there is no warm-up.
        """
        return cls(first, math.ceil(epochs * steps_per_epoch) if epochs else 0)

    def factor(self, step: int) -> float:
        """Factor of the learning rate in an optimizer step: above 0, and 1 after the warm-up."""
        return warm_up_factor(step - self.first, self.steps)


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: Callable[[str], float]) -> Iterator[None]:
    """Context in which the learning rates of an optimizer are multiplied.

    They are restored afterwards, because schedulers compute the next rate from the last one.

    Args:
        optimizer: With a group per stage. A stage may have several groups, ``STAGE`` and ``STAGE (...)``.
        factor: Factor of a stage.
    """
    before = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    try:
        for group, rate in before:
            group["lr"] = rate * factor(str(group.get("name", "")).partition(" ")[0])
        yield
    finally:
        for group, rate in before:
            group["lr"] = rate
