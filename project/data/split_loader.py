"""Batches of one split: stored rows where there are any, else images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from project.data.samplers import EpochSampler


class Batches(Protocol):
    """What can be iterated once an epoch, and has a length."""

    def __len__(self) -> int:
        """Batches of this process in an epoch."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch."""


class SplitLoader:
    """Batches of one split, for all epochs of a run.

    Whether they are rows or images is decided when the first batch of an epoch is asked for: a loader that Lightning
    looked at before the rows were there yields rows all the same. The epoch is read at that moment too, so a resumed
    fit needs nobody to set it on a sampler.

    Args:
        open_images: Makes a DataLoader of images, with an :class:`~project.data.samplers.EpochSampler`.
        epoch: Number of the epoch, which the order and the augmentation of the images follow from.

    Attributes:
        rows: Batches of stored rows, which take the place of the images; ``None`` for images.
    """

    def __init__(self, open_images: Callable[[], DataLoader[Any]], epoch: Callable[[], int]) -> None:
        self.rows: Batches | None = None
        self._open_images = open_images
        self._epoch = epoch
        self._images: DataLoader[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows if self.rows is not None else self.images)

    def __iter__(self) -> Iterator[Any]:
        if self.rows is not None:
            yield from self.rows
            return
        images = self.images
        assert isinstance(images.sampler, EpochSampler)
        images.sampler.set_epoch(self._epoch())
        yield from images

    @property
    def images(self) -> DataLoader[Any]:
        """The DataLoader of images. It lives for all epochs, as its processes do."""
        if self._images is None:
            self._images = self._open_images()
        return self._images

    def close(self) -> None:
        """Forget the DataLoader, which ends its processes; the next epoch opens another one."""
        self._images = None
