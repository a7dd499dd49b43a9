"""In which order images come: from the seed and the epoch alone, each process its share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler


class Order:
    """Indices of an epoch.

    Args:
        count: Images.
        shuffle: Whether the order is another one in each epoch.
        seed: Of the order.
        weights: How often each image is to come, relative to the others, float ``(N,)``: it is drawn with replacement.
        rank: Of this process; each takes its share of the images.
        world_size: Number of processes.
    """

    def __init__(
        self,
        count: int,
        shuffle: bool,
        seed: int = 0,
        weights: torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count = count
        self.shuffle = shuffle
        self._seed = seed
        self._weights = weights
        self._rank = rank
        self._world = world_size

    def __len__(self) -> int:
        return len(self._mine(torch.arange(self.count)))

    def __call__(self, epoch: int) -> torch.Tensor:
        """Indices of this process's images, int64."""
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            if self._weights is not None:
                order = torch.multinomial(self._weights, self.count, replacement=True, generator=generator)
            else:
                order = torch.randperm(self.count, generator=generator)
        return self._mine(order)

    def _mine(self, order: torch.Tensor) -> torch.Tensor:
        """This process's share: of equal length for all while training, each image once otherwise."""
        if self.shuffle and self._world > 1:
            lacking = -len(order) % self._world
            order = torch.cat([order, order.repeat(-(-lacking // len(order)))[:lacking]])
        mine = order[self._rank :: self._world]
        return mine if len(mine) else order[:1]  # more processes than images: Lightning takes no empty loader


class EpochSampler(DistributedSampler[Any]):
    """An order, for a DataLoader: image i of n, in epoch e, is number ``e * n + i``.

    So what a worker makes of an image can be drawn from the epoch. Lightning sets the epoch, and as this is a
    DistributedSampler already, it puts none of its own in its place, which would pad with duplicates.

    Args:
        order: The order.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        yield from (self._order(self.epoch) + self.epoch * self._order.count).tolist()
