"""Small pictures of images, read from where they are: stored rows have none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from project.data.sources.base import Sample, Source
from project.errors import DataError

GREY = 200
AHEAD = 32  # images that a source is told of before they are read


class Thumbnails:
    """Reads images of a split, and keeps none.

    Args:
        source: Reads them.
        samples: Of the split.
    """

    def __init__(self, source: Source, samples: Sequence[Sample]) -> None:
        self._source = source
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, place: int) -> str:
        """The name of an image."""
        return self._samples[place].name

    def read(self, places: Sequence[int], side: int, seconds: float = float("inf")) -> list[np.ndarray]:
        """The middle squares of images, uint8 ``(side, side, 3)``; grey ones of those that cannot be read any more.

        Args:
            places: Which of the split.
            side: Of the squares, in pixels.
            seconds: Time after which the rest are left out.
        """
        until = time.perf_counter() + seconds
        found: list[np.ndarray] = []
        lacking: list[str] = []
        for at, place in enumerate(places):
            if time.perf_counter() > until:
                break
            if at % AHEAD == 0:
                self._source.prefetch([self._samples[each] for each in places[at : at + AHEAD]])
            try:
                found.append(square(self._source.read(self._samples[place], side), side))
            except DataError as error:  # stored rows have no need of it
                lacking.append(str(error))
                found.append(np.full((side, side, 3), GREY, np.uint8))
        if lacking:
            warnings.warn(f"{len(lacking)} images that the dashboard shows are grey: {lacking[0]}", stacklevel=2)
        return found


def square(picture: Image.Image, side: int) -> np.ndarray:
    """The middle square of a picture, uint8 ``(side, side, 3)``."""
    return np.asarray(ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR))
