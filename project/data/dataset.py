"""Torch dataset and loader of images."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from project.data.samplers import Padding
from project.data.sources.base import Sample, Source
from project.data.transforms import SeededRandom, Transform
from project.errors import ProjectError
from project.runtime.seeding import derive_seed


class ImageBatch(NamedTuple):
    """A batch of images with targets. A dataset item is the same without the batch dimension.

    Attributes:
        images: uint8 ``(B, 3, H, W)``; float in [0, 1] after MixUp or CutMix.
        targets: Labels, int64 ``(B,)``; class probabilities, float ``(B, C)``, after MixUp or CutMix.
        valid: bool ``(B,)``; false for padding.
    """

    images: torch.Tensor
    targets: torch.Tensor | int
    valid: torch.Tensor | bool


class ImageDataset(Dataset[Any]):
    """Items are an :class:`ImageBatch` of one image, uint8 ``(3, H, W)``.

    Item ``epoch * N + i`` is image i of N in that epoch. Random transforms are seeded by the seed, the epoch and i, so
    they do not depend on the number of workers. Item -1 is the last image, as in any sequence.

    Args:
        samples: N samples.
        source: The source that reads them.
        transform: Applied to each image.
        seed: Seed of random transforms.
    """

    def __init__(self, samples: Sequence[Sample], source: Source, transform: Transform, seed: int = 0) -> None:
        self.samples = samples
        self._source = source
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return ImageBatch(
            self._image(number, self._transform), self._sample(number).label, not isinstance(number, Padding)
        )

    def _sample(self, number: int) -> Sample:
        return self.samples[number % len(self)]

    def _image(self, number: int, transform: Transform) -> torch.Tensor:
        epoch, index = divmod(number, len(self))
        image = self._source.read(self.samples[index], transform.min_size)
        with SeededRandom(derive_seed(self._seed, max(epoch, 0), index)):
            return transform(image)

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """The items of a batch. In a worker process, an error is returned as the item: see :class:`ImageLoader`."""
        try:
            self._source.prefetch([self._sample(number) for number in numbers])
            return [self[number] for number in numbers]
        except ProjectError as error:
            if get_worker_info() is None:
                raise
            return [error]


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises the original :class:`ProjectError` of a worker. It needs :func:`collate`.

    A plain DataLoader raises a new exception of the same class, without its fields, with the worker's traceback as the
    message.
    """

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        return _raise_errors(super().__iter__())  # not a generator itself, so that workers start immediately


def collate(items: list[Any]) -> Any:
    """Collate items into a batch, or return the error that a worker put in their place."""
    return items[0] if isinstance(items[0], ProjectError) else default_collate(items)


def _raise_errors(batches: Iterator[Any]) -> Generator[Any]:
    for batch in batches:
        if isinstance(batch, ProjectError):
            raise batch
        yield batch
