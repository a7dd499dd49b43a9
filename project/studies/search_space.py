"""The search space of a sweep, and samplers that draw settings from it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import torch

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.heads import CosineHead, HeadCallable, LinearHead, MLPHead
from project.models.readout import FeatureKind

SamplerName = Literal["grid", "optuna"]
ROUNDS = 4  # of Optuna's sampler: each round learns from the earlier ones


@dataclass
class SearchSpace:
    """Values to combine.

    Attributes:
        head: Classes of the head, each as class_path with init_args.
        features: Which outputs of the backbone are the features, see model.features.
        lr: Learning rates of AdamW.
        weight_decay: Weight decays of AdamW.
        label_smoothing: Label smoothing of the cross-entropy.
    """

    head: list[HeadCallable] = field(
        default_factory=lambda: [LinearHead, CosineHead, functools.partial(MLPHead, hidden=64)]
    )
    features: list[FeatureKind] = field(default_factory=lambda: ["last", "stages"])
    lr: list[float] = field(default_factory=lambda: [0.0003, 0.001, 0.003, 0.01])
    weight_decay: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.1])
    label_smoothing: list[float] = field(default_factory=lambda: [0.0, 0.1])

    def validate(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A list is empty, or a value is out of range.
        """
        for entry in fields(self):
            values = getattr(self, entry.name)
            if not values:
                raise ConfigError(f"space.{entry.name} is empty. Give at least one value, or omit it.")
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ConfigError(f"space.{entry.name} has a value twice. Give each value once.")
        if not all(0 < value < math.inf for value in self.lr):
            raise ConfigError(f"space.lr must be more than 0 and finite, not {self.lr}.")
        if not all(0 <= value < math.inf for value in self.weight_decay):
            raise ConfigError(f"space.weight_decay must be at least 0 and finite, not {self.weight_decay}.")
        if not all(0 <= value < 1 for value in self.label_smoothing):
            raise ConfigError(f"space.label_smoothing must be in [0, 1), not {self.label_smoothing}.")


@dataclass(frozen=True)
class HeadSettings:
    """A combination of the search space.

    Attributes:
        head: Class of the head.
        features: Which outputs are the features.
        lr: Learning rate; ``None`` for a solved head.
        weight_decay: Weight decay; ``None`` for a solved head.
        label_smoothing: Label smoothing.
    """

    head: ClassSpec
    features: FeatureKind
    lr: float | None
    weight_decay: float | None
    label_smoothing: float


class Sampler(Protocol):
    """Draws settings in rounds."""

    def ask(self) -> list[HeadSettings]:
        """Settings of the next round; none at the end."""

    def tell(self, accuracies: Sequence[float]) -> None:
        """Report the accuracies of the settings of the latest round."""


class GridSampler:
    """All combinations in one round, or as many of them as requested: equally many of each head and features.

    Args:
        space: The search space.
        count: Maximum number of combinations.
        seed: Seed of the choice.
    """

    def __init__(self, space: SearchSpace, count: int, seed: int) -> None:
        self._settings = _balanced(space, count, seed)

    def ask(self) -> list[HeadSettings]:
        """All combinations, then none."""
        settings, self._settings = self._settings, []
        return settings

    def tell(self, accuracies: Sequence[float]) -> None:
        """Ignore the accuracies."""


def _balanced(space: SearchSpace, count: int, seed: int) -> list[HeadSettings]:
    """Combinations in which each head, kind of features and optimizer setting occurs about equally often."""
    optimizers = [*itertools.product(space.lr, space.weight_decay, space.label_smoothing)]
    order = torch.randperm(len(optimizers), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [*itertools.product(space.head, space.features)]
    settings = []
    for turn in range(len(optimizers)):
        for number, (head, features) in enumerate(groups):  # each group begins at another part of the order
            index = order[(turn + number * len(order) // len(groups)) % len(order)]
            settings.append(_settings(head, features, *optimizers[index]))
    return settings[:count]


def _settings(head: HeadCallable, features: FeatureKind, lr: float, decay: float, smoothing: float) -> HeadSettings:
    return HeadSettings(ClassSpec.of(head), features, lr, decay, smoothing)


class OptunaSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), in rounds.

    Args:
        space: The search space.
        count: Number of combinations.
        seed: Seed of the sampler.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, space: SearchSpace, count: int, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("--sampler optuna needs Optuna. Install it: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        self._space, self._left, self._size = space, count, -(-count // ROUNDS)
        self._trials: list[Any] = []

    def ask(self) -> list[HeadSettings]:
        """Settings that the earlier rounds suggest."""
        self._trials = [self._study.ask() for _ in range(min(self._size, self._left))]
        self._left -= len(self._trials)
        return [self._draw(trial) for trial in self._trials]

    def _draw(self, trial: Any) -> HeadSettings:
        values = {}
        for entry in fields(self._space):
            choices = getattr(self._space, entry.name)
            values[entry.name] = choices[trial.suggest_categorical(entry.name, list(range(len(choices))))]
        return _settings(
            values["head"], values["features"], values["lr"], values["weight_decay"], values["label_smoothing"]
        )

    def tell(self, accuracies: Sequence[float]) -> None:
        """Add the accuracies to the study."""
        for trial, accuracy in zip(self._trials, accuracies, strict=True):
            self._study.tell(trial, accuracy)


#: Each is constructed with the search space, the number of combinations and a seed.
SAMPLERS: dict[SamplerName, Callable[[SearchSpace, int, int], Sampler]] = {
    "grid": GridSampler,
    "optuna": OptunaSampler,
}
