"""Order of the images in an epoch, and how it is divided among ranks. It depends only on the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.data import DistributedSampler

from project.runtime.seeding import shuffle_seed


class Padding(int):
    """A padding index: its image is excluded from the loss and the metrics.

    It gives all ranks the same number of images, because they must take the same number of steps.
    """


class RankIndices(NamedTuple):
    """Image indices of one rank in an epoch.

    Attributes:
        indices: int64 ``(N,)``; padding repeats the last image.
        valid: bool ``(N,)``; false for padding.
    """

    indices: torch.Tensor
    valid: torch.Tensor


class EpochOrder:
    """Order of the images in an epoch, divided among ranks.

    Rank r of W takes images r, r + W, r + 2 W, … of the order, so one step of all ranks with batch size b has the same
    images as one step of a single process with batch size b * W. Ranks with fewer images get padding.

    Args:
        count: Number of images.
        shuffle: Whether to shuffle in each epoch, for training.
        seed: Seed of the shuffle.
        weights: Sampling weight of each image, float ``(N,)``, for sampling with replacement.
        rank: Rank of this process.
        world_size: Number of processes.
        batch_size: Batch size per process. BatchNorm cannot train on a single image: if the last global batch of a
            shuffled epoch had one image, that image is dropped, a different one in each epoch.
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
        self._world_size = world_size
        global_batch_size = batch_size * world_size
        drops_last = shuffle and 1 < global_batch_size < count and count % global_batch_size == 1
        self._used = count - drops_last
        self._per_rank = -(-self._used // world_size)
        if shuffle and batch_size > 1 and self._per_rank % batch_size == 1 and world_size > 1:
            self._per_rank += 1  # add padding where each rank would have a single image in the last batch

    def __len__(self) -> int:
        return self._per_rank

    def __call__(self, epoch: int) -> RankIndices:
        """Indices of this rank, padding last."""
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(shuffle_seed(self._seed, epoch))
            if self._weights is not None:
                order = torch.multinomial(self._weights, self.count, replacement=True, generator=generator)
            else:
                order = torch.randperm(self.count, generator=generator)
        own = order[: self._used][self._rank :: self._world_size]
        indices = functional.pad(own, (0, self._per_rank - len(own)), value=self.count - 1)
        return RankIndices(indices, torch.arange(self._per_rank) < len(own))


class EpochSampler(DistributedSampler[Any]):
    """An :class:`EpochOrder` as a sampler: image i of N in an epoch has index ``epoch * N + i``.

    The index carries the epoch to the workers, for random transforms. Lightning sets the epoch. It does not replace a
    DistributedSampler with its own, which would pad with duplicates that enter the metrics.

    Args:
        order: The order.
        skip_images: Number of images to skip at the start of the epoch, because a resumed fit has trained on them.
    """

    def __init__(self, order: EpochOrder, skip_images: Callable[[], int] = lambda: 0) -> None:
        self._order = order
        self._skip_images = skip_images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        indices, valid = self._order(self.epoch)
        numbers = (indices + self.epoch * self._order.count).tolist()
        for number, is_valid in [*zip(numbers, valid.tolist(), strict=True)][self._skip_images() :]:
            yield number if is_valid else Padding(number)
