"""In which order images come: from the seed and the epoch alone, each process its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.data import DistributedSampler

from project.runtime.seeding import order_seed


class Padding(int):
    """An index that fills up the share of a process with fewer images than others; the image at it counts for nothing.

    Processes take the same number of steps, so their shares have to be equally long.
    """


class Share(NamedTuple):
    """One process's images of an epoch.

    Attributes:
        indices: int64 ``(N,)``; padding has that of the last image.
        valid: Whether each counts, bool ``(N,)``: false for padding.
    """

    indices: torch.Tensor
    valid: torch.Tensor


class EpochOrder:
    """Indices of an epoch.

    Process r of W takes images r, r + W, r + 2 W, … of the order, so the b images that each takes next are together the
    b * W that one process would take. What is lacking to shares of equal length is padding, which counts for nothing.

    Args:
        count: Images.
        shuffle: Whether the order is another one in each epoch, for training.
        seed: Of the order.
        weights: How often each image is to come, relative to the others, float ``(N,)``: it is drawn with replacement.
        rank: Of this process; each takes its share of the images.
        world_size: Number of processes.
        batch_size: Images a batch of one process. BatchNorm cannot train on one image: where one would be left for the
            last batch of all processes, it is left out, another one in each epoch.
    """

    def __init__(
        self,
        count: int,
        shuffle: bool,
        seed: int = 0,
        weights: torch.Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
    ) -> None:
        self.count = count
        self.shuffle = shuffle
        self._seed = seed
        self._weights = weights
        self._rank = rank
        self._world = world_size
        together = batch_size * world_size
        alone = shuffle and 1 < together < count and count % together == 1
        self._taken = count - alone
        self._share = -(-self._taken // world_size)
        if shuffle and batch_size > 1 and self._share % batch_size == 1 and world_size > 1:
            self._share += 1  # nor can it where each process has one image of the last batch

    def __len__(self) -> int:
        return self._share

    def __call__(self, epoch: int) -> Share:
        """This process's images, with padding at their end."""
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(order_seed(self._seed, epoch))
            if self._weights is not None:
                order = torch.multinomial(self._weights, self.count, replacement=True, generator=generator)
            else:
                order = torch.randperm(self.count, generator=generator)
        mine = order[: self._taken][self._rank :: self._world]
        indices = functional.pad(mine, (0, self._share - len(mine)), value=self.count - 1)
        return Share(indices, torch.arange(self._share) < len(mine))


class EpochSampler(DistributedSampler[Any]):
    """An order, for a DataLoader: image i of n, in epoch e, is number ``e * n + i``; padding is marked as such.

    So what a worker makes of an image can be drawn from the epoch. Lightning sets the epoch, and as this is a
    DistributedSampler already, it puts none of its own in its place, which would pad with duplicates.

    Args:
        order: The order.
        skip_images: Number of images to skip at the start of the epoch: a resumed fit has trained on them.
    """

    def __init__(self, order: EpochOrder, skip_images: Callable[[], int] = lambda: 0) -> None:
        self._order = order
        self._skip_images = skip_images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        indices, valid = self._order(self.epoch)
        numbers = (indices + self.epoch * self._order.count).tolist()
        for number, counts in [*zip(numbers, valid.tolist(), strict=True)][self._skip_images() :]:
            yield number if counts else Padding(number)
