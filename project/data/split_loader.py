"""Loader of one split: stored rows if there are any, else images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader

from project.data.samplers import EpochSampler


class Batches(Protocol):
    """A sized iterable of batches, iterated once per epoch."""

    def __len__(self) -> int:
        """Number of batches of this rank in an epoch."""

    def __iter__(self) -> Iterator[Any]:
        """The batches of an epoch."""


class SplitLoader:
    """Batches of one split, in every epoch of a run.

    Each epoch chooses between rows and images when its first batch is requested, because Lightning gets the loader
    before the rows exist. The epoch number is read at the same time, so no caller has to call ``set_epoch`` after
    a resume.

    Args:
        open_images: Creates a DataLoader of images, with an :class:`~project.data.samplers.EpochSampler`.
        epoch: Returns the current epoch, which determines the order and the augmentation of the images.

    Attributes:
        rows: Batches of stored rows, used instead of images; ``None`` for images.
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
        """The DataLoader of images. It and its worker processes persist across epochs."""
        if self._images is None:
            self._images = self._open_images()
        return self._images

    def close(self) -> None:
        """Drop the DataLoader, which stops its workers. The next epoch creates a new one."""
        self._images = None
