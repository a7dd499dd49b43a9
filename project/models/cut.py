"""The boundary between the frozen prefix and the trainable suffix of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from project.errors import ModelError, nearest


@dataclass(frozen=True)
class Cut:
    """Which stages of a backbone are frozen: all before the boundary. An immutable value.

    Attributes:
        frozen: Names of the frozen stages, in order.
        trainable: Names of the stages that train, in order.
    """

    frozen: tuple[str, ...]
    trainable: tuple[str, ...] = ()

    @classmethod
    def at(cls, stages: Sequence[str], trainable: str, network: str) -> Cut:
        """Cut a chain of stages.

        Args:
            stages: Names of all stages, in order.
            trainable: ``head`` (every stage is frozen), a stage's name (that stage and those after it train), or
                ``all``.
            network: Name of the network, for the message.

        Raises:
            ModelError: There is no stage of that name.
        """
        places = {"head": len(stages), "all": 0} | {name: index for index, name in enumerate(stages)}
        if trainable not in places:
            raise ModelError(
                f"model.trainable: {network} has no stage {trainable!r}. {nearest(trainable, places)}"
                f"It has {', '.join(stages)}; or say head, or all."
            )
        place = places[trainable]
        return cls(tuple(stages[:place]), tuple(stages[place:]))
