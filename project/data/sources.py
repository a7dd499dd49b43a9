"""Where labelled images come from. Each source gives the same thing: classes, and samples in splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from project.data.images import decode_image, find_images, read_bytes
from project.errors import DataError, nearest

#: Names that people give to the folders of a split.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Sample(NamedTuple):
    """One labelled image.

    Attributes:
        name: The file's path, or another name that tells it from all others.
        label: Index into the source's classes.
    """

    name: str
    label: int


class Source(ABC):
    """Labelled images, some of them already in splits."""

    name: str
    classes: tuple[str, ...]
    #: By ``train``, ``val`` and ``test``; a source without splits of its own has ``train`` alone.
    splits: Mapping[str, list[Sample]]

    @abstractmethod
    def content(self, sample: Sample) -> bytes:
        """The bytes that a sample's image is made from: two samples with the same bytes have the same image.

        Like :meth:`decode`, it is called from several threads at once.
        """

    @abstractmethod
    def decode(self, content: bytes, sample: Sample) -> Image.Image:
        """Make the image, in RGB, of a sample from its bytes."""

    def read(self, sample: Sample) -> Image.Image:
        """Read the image of a sample, in RGB."""
        return self.decode(self.content(sample), sample)


class Folder(Source):
    """``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``. Classes are those of train, in order of their names.

    Args:
        root: The folder.

    Raises:
        DataError: It is missing or empty, has less than two classes, or a class that train has not.
    """

    def __init__(self, root: str) -> None:
        top = Path(root).expanduser()
        if not top.is_dir():
            raise DataError(
                f"data.root: there is no folder {root}. Name one that holds a folder of images for each class."
            )
        self.name = top.resolve().name
        places: dict[str, Path] = {}
        for child in _folders(top):
            split = SPLITS.get(child.name.lower())
            if split in places:
                raise DataError(f"data.root: {places[split]} and {child} are both the {split} split. Keep one.")
            if split:
                places[split] = child
        if "train" not in places:
            if places:
                raise DataError(
                    f"data.root: {root} has {', '.join(sorted(places))}, but no folder train. Add train/CLASS/*.jpg."
                )
            places = {"train": top}
        self.classes = tuple(child.name for child in _folders(places["train"]))
        self._check(places["train"])
        self.splits = {
            split: self._samples(split, places[split]) for split in ("train", "val", "test") if split in places
        }

    def _check(self, train: Path) -> None:
        layout = f"It should hold a folder of images for each class: {train}/CLASS/*.jpg"
        if not self.classes:
            count = len(find_images(train))
            raise DataError(f"data.root: {train} has {count or 'no'} images and no folders of classes. {layout}")
        if len(self.classes) == 1:
            raise DataError(f"data.root: {train} has one class only, {self.classes[0]!r}; two are needed. {layout}")

    def _samples(self, split: str, folder: Path) -> list[Sample]:
        samples: list[Sample] = []
        for child in _folders(folder):
            if child.name not in self.classes:
                raise DataError(
                    f"data.root: class {child.name!r} is in {split} only ({child}), so nothing could learn it. "
                    f"{nearest(child.name, self.classes)}Put images of it into train, or remove it."
                )
            files = find_images(child)
            if not files and split == "train":
                raise DataError(f"data.root: class {child.name!r} has no images in {child}. Add some, or remove it.")
            samples += [Sample(str(file), self.classes.index(child.name)) for file in files]
        if not samples:
            raise DataError(f"data.root: there are no images in {folder}. Add some, or remove the folder.")
        return samples

    def content(self, sample: Sample) -> bytes:
        """Read a file; a :class:`~project.errors.DataError` names one that cannot be read."""
        return read_bytes(sample.name)

    def decode(self, content: bytes, sample: Sample) -> Image.Image:
        """Decode a file, upright and in RGB; a :class:`~project.errors.DataError` names one that cannot be."""
        return decode_image(content, sample.name)


class Digits(Source):
    """The 1,797 handwritten digits that scikit-learn carries (UCI, 8 x 8 pixels): real data without a download.

    Each is set on a margin of its own background, as the classes of ImageNet do not fill their images to the edge
    either, and the centre crop would cut strokes off.

    Args:
        margin: Pixels of background added on each side.
    """

    def __init__(self, margin: int = 1) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "The built-in digits come with scikit-learn. Install it: pip install scikit-learn"
            ) from error
        digits = load_digits()
        self.name = "digits"
        self.classes = tuple(str(name) for name in digits.target_names)
        self.splits = {"train": [Sample(f"digits/{i:04d}", int(label)) for i, label in enumerate(digits.target)]}
        self._margin = margin
        self._pixels = (digits.images * (255 / 16)).astype("uint8")

    def content(self, sample: Sample) -> bytes:
        """The digit's pixels, behind the width of its margin."""
        pixels: bytes = self._pixels[int(sample.name.rpartition("/")[2])].tobytes()
        return bytes([self._margin]) + pixels

    def decode(self, content: bytes, sample: Sample) -> Image.Image:
        """Draw a digit, white on black, in RGB."""
        digit = Image.frombytes("L", self._pixels.shape[:0:-1], content[1:])
        canvas = Image.new("RGB", (digit.width + 2 * self._margin, digit.height + 2 * self._margin))
        canvas.paste(digit.convert("RGB"), (self._margin, self._margin))
        return canvas


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))
