"""The boundary between the frozen prefix and the trainable suffix of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from project.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Cut:
    """Split of a backbone into frozen and trainable stages. Immutable.

    Attributes:
        frozen: Names of the frozen stages, in order.
        trainable: Names of the trainable stages, in order.
    """

    frozen: tuple[str, ...]
    trainable: tuple[str, ...] = ()

    @classmethod
    def at(cls, stages: Sequence[str], trainable: str, network: str, setting: str = "model.trainable") -> Cut:
        """Create the cut before a stage.

        Args:
            stages: Names of all stages, in order.
            trainable: First trainable stage; ``head`` freezes all stages, ``all`` trains all of them.
            network: Name of the network, for the error message.
            setting: Name of the setting, for the error message.

        Raises:
            ModelError: The stage does not exist.
        """
        positions = {"head": len(stages), "all": 0} | {name: index for index, name in enumerate(stages)}
        if trainable not in positions:
            raise ModelError(
                f"{setting}: {network} has no stage {trainable!r}. {did_you_mean(trainable, positions)}"
                f"Use one of {', '.join(stages)}, head or all."
            )
        position = positions[trainable]
        return cls(tuple(stages[:position]), tuple(stages[position:]))
