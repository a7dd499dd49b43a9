"""Thumbnails of images, read from the source: stored features contain no pixels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from project.data.sources.base import Sample, Source
from project.errors import DataError

GREY = 200
PREFETCH = 32  # images that the source prefetches at a time


class Thumbnails:
    """Reads thumbnails of the images of a split, without caching.

    Args:
        source: Reads the images.
        samples: The samples of the split.
    """

    def __init__(self, source: Source, samples: Sequence[Sample]) -> None:
        self._source = source
        self._samples = samples

    def name(self, index: int) -> str:
        """Name of an image."""
        return self._samples[index].name

    def read(self, indices: Sequence[int], size: int, seconds: float = float("inf")) -> list[np.ndarray]:
        """Center squares of images, uint8 ``(size, size, 3)`` each; grey for images that are no longer readable.

        Args:
            indices: Indices of the images in the split.
            size: Side of the squares in pixels.
            seconds: Time limit; the remaining images are omitted.
        """
        deadline = time.perf_counter() + seconds
        thumbnails: list[np.ndarray] = []
        errors: list[str] = []
        for position, index in enumerate(indices):
            if time.perf_counter() > deadline:
                break
            if position % PREFETCH == 0:
                self._source.prefetch([self._samples[ahead] for ahead in indices[position : position + PREFETCH]])
            try:
                thumbnails.append(center_square(self._source.read(self._samples[index], size), size))
            except DataError as error:  # training on stored features does not need the image
                errors.append(str(error))
                thumbnails.append(np.full((size, size, 3), GREY, np.uint8))
        if errors:
            warnings.warn(f"Dashboard: {len(errors)} images cannot be read and are grey: {errors[0]}", stacklevel=2)
        return thumbnails


def center_square(image: Image.Image, size: int) -> np.ndarray:
    """Center square of an image, resized to uint8 ``(size, size, 3)``."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
