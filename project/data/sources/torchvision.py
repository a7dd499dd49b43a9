"""torchvision's data sets for classification as a source."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

from PIL import ImageOps
from torchvision.datasets import VisionDataset

from project.data.image_io import read_bytes, stamp
from project.data.sources.base import Sample
from project.data.sources.files import PublishedDataset
from project.data.sources.torchvision_reader import bound_class, class_name, labels_and_paths, open_splits, read_item


class Torchvision(PublishedDataset):
    """A data set of torchvision, or another one made like them, for classification.

    Of a class with an argument ``train`` or ``split`` all splits are taken; if that argument is given another value
    than its default, that split alone, as train.

    Args:
        dataset: The class, with its arguments bound by :func:`functools.partial`; or a data set, which is all train.
    """

    def __init__(self, dataset: Callable[[], VisionDataset] | VisionDataset) -> None:
        self._dataset = dataset
        kind = type(dataset) if isinstance(dataset, VisionDataset) else bound_class(dataset)
        self.name = getattr(kind, "__name__", str(kind)).lower()

    def _prepare(self) -> None:
        dataset = self._dataset
        opened = {"train": dataset} if isinstance(dataset, VisionDataset) else open_splits(dataset)
        self._items: dict[str, tuple[VisionDataset, int]] = {}
        rows: dict[str, list[tuple[str, int | None]]] = {}
        for split, one in opened.items():
            labels, names = labels_and_paths(one, f"{self.name}/{split}")
            if names is None:
                names = [f"{self.name}/{split}/{number:05d}" for number in range(len(one))]
                self._items.update((name, (one, number)) for number, name in enumerate(names))
            rows[split] = list(zip(names, labels, strict=True))
        self._take(rows, functools.partial(class_name, opened["train"]))
        del self._dataset  # a factory of the command line cannot be sent to another process

    def content(self, sample: Sample) -> bytes:
        """The bytes of the image's file; of an image that comes from no file of its own, those of a TIFF file."""
        if sample.name not in self._items:
            return read_bytes(sample.name)
        file = io.BytesIO()
        image = read_item(*self._items[sample.name], sample.name)
        ImageOps.exif_transpose(image).save(file, "TIFF")  # not compressed, and pixels of any kind as they are
        return file.getvalue()

    def stamp(self, sample: Sample) -> str | None:
        """Size, time of the last change, and inode of the file, where there is one."""
        return None if sample.name in self._items else stamp(sample.name)
