"""Image preprocessing that a set of weights requires."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """Resize, center crop and normalization.

    Attributes:
        resize: Length in pixels that the shorter edge is resized to.
        crop: Side in pixels of the center crop: the network's image size.
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or another Pillow filter.
        mean: Mean per channel, for values in [0, 1].
        std: Standard deviation per channel, for values in [0, 1].
        squash: Whether both edges are resized to ``resize``, ignoring the aspect ratio.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False

    def with_image_size(self, size: int | None) -> Preprocessing:
        """Preprocessing for another image size, with the same ratio of resize to crop.

        Args:
            size: Side of the crop in pixels; ``None`` keeps the current size.
        """
        if size is None:
            return self
        return replace(self, crop=size, resize=round(size * self.resize / self.crop))

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, for a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
