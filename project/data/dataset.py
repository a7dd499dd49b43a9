"""Samples as a torch dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch.utils.data import Dataset

from project.data.images import read_image
from project.data.sources import Sample
from project.data.transforms import Transform


class LabelledImages(Dataset[tuple[torch.Tensor, int]]):
    """Items are an image, uint8 ``(3, H, W)``, and the index of its class.

    Args:
        samples: What to read.
        read: Reads the image of a sample.
        transform: From the image to the tensor.
    """

    def __init__(self, samples: Sequence[Sample], read: Callable[[Sample], Image.Image], transform: Transform) -> None:
        self.samples = samples
        self._read = read
        self._transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self.samples[index]
        return self._transform(self._read(sample)), sample.label


class UnlabelledImages(Dataset[tuple[torch.Tensor, str]]):
    """Items are an image, uint8 ``(3, H, W)``, and its path.

    Args:
        paths: Files to read.
        transform: From the image to the tensor.
    """

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        self.paths = paths
        self._transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self._transform(read_image(self.paths[index])), self.paths[index]
