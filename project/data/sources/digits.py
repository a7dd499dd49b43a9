"""The handwritten digits of scikit-learn as a source."""

from __future__ import annotations

from PIL import Image

from project.data.sources.base import Sample, Source
from project.errors import DataError


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn (UCI, 8 x 8 pixels), a real data set without a download.

    A margin is added because the digits fill their images to the edge, unlike the objects of ImageNet: the center crop
    would cut strokes off.

    Args:
        margin: Black pixels added on each side.
    """

    name = "digits"

    def __init__(self, margin: int = 1) -> None:
        self._margin = margin

    def _prepare(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("The digits data set needs scikit-learn: pip install scikit-learn") from error
        digits = load_digits()
        self.classes = tuple(str(name) for name in digits.target_names)
        self.splits = {"train": [Sample(f"digits/{i:04d}", int(label)) for i, label in enumerate(digits.target)]}
        self._pixels = (digits.images * (255 / 16)).astype("uint8")

    def content(self, sample: Sample) -> bytes:
        """The margin as one byte, then the pixels of the digit."""
        pixels: bytes = self._pixels[int(sample.name.rpartition("/")[2])].tobytes()
        return bytes([self._margin]) + pixels

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """Decode a digit to an RGB image, white on black."""
        digit = Image.frombytes("L", self._pixels.shape[:0:-1], content[1:])
        canvas = Image.new("RGB", (digit.width + 2 * self._margin, digit.height + 2 * self._margin))
        canvas.paste(digit.convert("RGB"), (self._margin, self._margin))
        return canvas
