"""The boundary between the frozen prefix and the trainable suffix of a backbone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from project.errors import ModelError, did_you_mean

#: Name of the single stage of a network that is not divided.
WHOLE = "body"


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
            trainable: First trainable stage; ``head`` freezes all stages, ``all`` trains all of them, and ``-2`` trains
                the last two.
            network: Name of the network, for the error message.
            setting: Name of the setting, for the error message.

        Raises:
            ModelError: The stage does not exist, or there are fewer stages.
        """
        count = len(stages)
        positions = {"head": count, "all": 0} | {name: index for index, name in enumerate(stages)}
        # Earlier versions did not divide all networks that are divided now.
        aliases = {WHOLE: 0} | {str(-last): count - last for last in range(1, count + 1)}
        position = positions.get(trainable, aliases.get(trainable))
        if position is None and re.fullmatch(r"[+-]?\d+", trainable):
            last = "-1" if count == 1 else f"-1 to -{count}"
            raise ModelError(
                f"{setting}: {network} has {count} {'stage' if count == 1 else 'stages'}, so {trainable} is out "
                f"of range. Use {last} for the last stages, a stage ({', '.join(stages)}), head or all."
            )
        if position is None:
            raise ModelError(
                f"{setting}: {network} has no stage {trainable!r}. {did_you_mean(trainable, positions)}"
                f"Use one of {', '.join(stages)}, head or all."
            )
        return cls(tuple(stages[:position]), tuple(stages[position:]))
