"""Samples as a torch dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from project.data.samplers import Padding
from project.data.sources.base import Sample, Source
from project.data.transforms import Drawn, Transform
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


class Images(Dataset[Any]):
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
        image = self._source.read(self.samples[index], self._transform.enough)
        with Drawn(seed_at(self._seed, max(epoch, 0), index)):
            return self._transform(image)

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """The items of a batch."""
        self._source.expect([self._sample(number) for number in numbers])
        return [self[number] for number in numbers]


class NamedImages(Images):
    """Items are an image, uint8 ``(3, H, W)``, and its name, which padding has none of."""

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        return self._image(number), "" if isinstance(number, Padding) else self._sample(number).name
