"""Lightning callbacks that do not work with a frozen backbone or with a head that is created from the data."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from project.errors import ConfigError

AVERAGING = "is not supported: the head is created later, from the data. Use --model.ema 0.999 instead"
#: Why each callback is not supported, and the alternative.
UNSUPPORTED: dict[type[Callback], str] = {
    BaseFinetuning: "would train frozen stages. Use --model.schedule '{0: head, 3: layer4}'",
    LearningRateFinder: "needs a learning_rate attribute, which the model does not have. Use fit --lr_find",
    ModelPruning: "would change frozen weights. Remove it",
    StochasticWeightAveraging: AVERAGING,
    WeightAveraging: AVERAGING,
}


def refuse_unsupported(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that would fail or have no effect.

    Raises:
        ConfigError: A callback is not supported.
    """
    for callback in callbacks:
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} {reason}.")
