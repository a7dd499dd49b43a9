"""How an image is brought into the form that a set of weights was trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation, as the weights ask for them.

    Attributes:
        resize: Length in pixels that the shorter edge is resized to.
        crop: Side in pixels of the centre crop, the network's input size.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or another name of Pillow's filters.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        squash: Whether both edges are resized to that length, and the image's shape is lost.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False

    def at(self, size: int | None) -> Preprocessing:
        """The same preprocessing for another input size, with the same share of the image cropped.

        Args:
            size: Side of the crop in pixels; ``None`` keeps the weights' own.
        """
        if size is None:
            return self
        return replace(self, crop=size, resize=round(size * self.resize / self.crop))

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
