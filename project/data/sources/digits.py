"""The handwritten digits that scikit-learn carries."""

from __future__ import annotations

from PIL import Image

from project.data.sources.base import Sample, Source
from project.errors import DataError


class Digits(Source):
    """The 1,797 handwritten digits that scikit-learn carries (UCI, 8 x 8 pixels): real data without a download.

    Each is set on a margin of its own background, as the classes of ImageNet do not fill their images to the edge
    either, and the centre crop would cut strokes off.

    Args:
        margin: Pixels of background added on each side.
    """

    name = "digits"

    def __init__(self, margin: int = 1) -> None:
        self._margin = margin

    def _prepare(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "The built-in digits come with scikit-learn. Install it: pip install scikit-learn"
            ) from error
        digits = load_digits()
        self.classes = tuple(str(name) for name in digits.target_names)
        self.splits = {"train": [Sample(f"digits/{i:04d}", int(label)) for i, label in enumerate(digits.target)]}
        self._pixels = (digits.images * (255 / 16)).astype("uint8")

    def content(self, sample: Sample) -> bytes:
        """The digit's pixels, behind the width of its margin."""
        pixels: bytes = self._pixels[int(sample.name.rpartition("/")[2])].tobytes()
        return bytes([self._margin]) + pixels

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """Draw a digit, white on black, in RGB."""
        digit = Image.frombytes("L", self._pixels.shape[:0:-1], content[1:])
        canvas = Image.new("RGB", (digit.width + 2 * self._margin, digit.height + 2 * self._margin))
        canvas.paste(digit.convert("RGB"), (self._margin, self._margin))
        return canvas
