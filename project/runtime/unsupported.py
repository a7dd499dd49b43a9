"""Lightning's own parts that cannot work with a frozen backbone and a head that the data makes."""

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

AVERAGES = "averages weights from before there is a head. Leave it out"
#: What is wrong with each callback, and the way that works.
CALLBACKS: dict[type[Callback], str] = {
    BaseFinetuning: "would train stages that are frozen for the whole fit. Use --model.trainable layer4",
    LearningRateFinder: "looks for a learning rate that the model does not have. Set --model.optimizer.lr",
    ModelPruning: "would change frozen weights. Leave it out",
    StochasticWeightAveraging: AVERAGES,
    WeightAveraging: AVERAGES,
}


def refuse_unsupported(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that would do nothing, or fail.

    Raises:
        ConfigError: There is one.
    """
    for callback in callbacks:
        for kind, why in CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} {why}.")
