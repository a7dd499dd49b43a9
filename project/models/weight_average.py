"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

Tensors = Mapping[str, torch.Tensor]


class WeightAverage:
    """Exponential moving average of tensors by name, with a warm-up of the decay.

    The first update copies the tensors. Update ``n + 1`` has the decay ``min(decay, (1 + n) / (10 + n))``, so that the
    average of a short fit is not dominated by its first weights (TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``). Averages of weights: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging",
    1992; with an exponential decay: Tarvainen and Valpola, "Mean teachers are better role models", arXiv:1703.01780.

    Integer tensors, such as the number of batches that BatchNorm counts, are copied. Averages of narrower floats than
    float32 are float32, as small updates would be rounded away.

    Args:
        decay: Weight of the previous average in an update, in (0, 1).

    Attributes:
        tensors: The averages; none before the first update.
        updates: Number of updates so far.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.tensors: dict[str, torch.Tensor] = {}
        self.updates = 0

    @property
    def next_decay(self) -> float:
        """Decay of the next update."""
        return min(self._decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0

    @torch.no_grad()
    def update(self, tensors: Tensors) -> None:
        """Average the current values of tensors; those with a new name are copied.

        Args:
            tensors: Detached tensors by name.
        """
        averages, values = [], []
        for name, tensor in tensors.items():
            average = self.tensors.get(name)
            if average is None or not tensor.is_floating_point():
                self.tensors[name] = _copy(tensor)
            else:
                averages.append(average)
                values.append(tensor.to(average.dtype))
        if averages:
            get_ema_multi_avg_fn(self.next_decay)(averages, values, self.updates)  # type: ignore[no-untyped-call]
        self.updates += 1

    def add(self, tensors: Tensors) -> None:
        """Start the averages of tensors with a new name, which were frozen until now, at their values.

        Args:
            tensors: Detached tensors by name.
        """
        for name, tensor in tensors.items():
            if name not in self.tensors:
                self.tensors[name] = _copy(tensor)

    def restore(self, updates: int, tensors: Tensors) -> None:
        """Replace the averages and the number of updates."""
        self.updates, self.tensors = updates, dict(tensors)

    def place(self, tensors: Tensors) -> None:
        """Move the averages to the devices and memory layouts of the averaged tensors.

        Args:
            tensors: The averaged tensors by name.
        """
        self.tensors = {
            name: torch.empty_like(tensors[name], dtype=average.dtype).copy_(average)
            for name, average in self.tensors.items()
        }

    def from_rank_zero(self, names: Collection[str]) -> None:
        """Replace averages by those of rank zero. Collective: all ranks must call it."""
        for name in sorted(self.tensors.keys() & set(names)):
            average = self.tensors[name].contiguous()
            dist.broadcast(average, 0)
            self.tensors[name].copy_(average)

    @contextmanager
    def applied(self, tensors: Tensors) -> Iterator[None]:
        """Context in which tensors have the averaged values.

        The memory of the tensors is exchanged, so their own values are bit-identical afterwards.

        Args:
            tensors: The averaged tensors, not detached, by name.
        """
        values = {name: tensors[name].data for name in self.tensors}
        try:
            for name, average in self.tensors.items():
                tensors[name].data = average.to(tensors[name].dtype)
            yield
        finally:
            for name, value in values.items():
                tensors[name].data = value


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor; floats are at least float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=True)
