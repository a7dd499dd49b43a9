"""Samples as a torch dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from project.data.samplers import Padding
from project.data.sources.base import Sample, Source
from project.data.transforms import SeededRandom, Transform
from project.errors import ProjectError
from project.runtime.seeding import seed_at


class ImageBatch(NamedTuple):
    """Images with their targets; an item of a dataset is one without the first dimension.

    Attributes:
        images: uint8 ``(B, 3, H, W)``; of mixed images float in [0, 1].
        targets: int64 ``(B,)``; of mixed images the share of each class, float ``(B, C)``.
        valid: Whether each image counts, bool ``(B,)``: false for padding.
    """

    images: torch.Tensor
    targets: torch.Tensor | int
    valid: torch.Tensor | bool


class ImageDataset(Dataset[Any]):
    """Items are :class:`ImageBatch` of one image, uint8 ``(3, H, W)``.

    Item ``e * n + i`` of n is image i in epoch e: what is random in the transform is drawn from the seed, the epoch and
    i, so it is the same with any number of workers. As in any sequence, item -1 is the last image.

    Args:
        samples: What to read.
        source: Reads them.
        transform: From the image to the tensor.
        seed: Of what is random in the transform.
    """

    def __init__(self, samples: Sequence[Sample], source: Source, transform: Transform, seed: int = 0) -> None:
        self.samples = samples
        self._source = source
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return ImageBatch(self._image(number), self._sample(number).label, not isinstance(number, Padding))

    def _sample(self, number: int) -> Sample:
        return self.samples[number % len(self)]

    def _image(self, number: int) -> torch.Tensor:
        epoch, index = divmod(number, len(self))
        image = self._source.read(self.samples[index], self._transform.min_size)
        with SeededRandom(seed_at(self._seed, max(epoch, 0), index)):
            return self._transform(image)

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """The items of a batch; in a worker process, a mistake in the data is an item: see :class:`ImageLoader`."""
        try:
            self._source.prefetch([self._sample(number) for number in numbers])
            return [self[number] for number in numbers]
        except ProjectError as error:
            if get_worker_info() is None:
                raise
            return [error]


class NamedImageDataset(ImageDataset):
    """Items are an image, uint8 ``(3, H, W)``, and its name, which padding has none of."""

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        return self._image(number), "" if isinstance(number, Padding) else self._sample(number).name


class ImageLoader(DataLoader[Any]):
    """A DataLoader of images, with :func:`collate`, that raises a worker's mistake in the data as it was.

    torch's own makes an exception of the same class, without its fields, whose message is the worker's traceback.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _raising(super().__iter__())


def collate(items: list[Any]) -> Any:
    """A batch of items; the error where a worker has one in their place."""
    return items[0] if isinstance(items[0], ProjectError) else default_collate(items)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, ProjectError):
            raise batch
        yield batch
