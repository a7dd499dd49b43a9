"""torchvision's classification data sets as a source."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

from PIL import ImageOps
from torchvision.datasets import VisionDataset

from project.data.image_io import read_bytes, stamp
from project.data.sources.base import Sample
from project.data.sources.files import PublishedDataset
from project.data.sources.torchvision_reader import bound_class, class_name, labels_and_paths, open_splits, read_image


class Torchvision(PublishedDataset):
    """A classification data set of torchvision, or one with the same interface.

    A class with an argument ``train`` or ``split`` is opened once per split. If that argument is set to a value other
    than its default, only that split is opened, as train.

    Args:
        dataset: The class, with its arguments bound by :func:`functools.partial`; or an instance, which is all train.
    """

    def __init__(self, dataset: Callable[[], VisionDataset] | VisionDataset) -> None:
        self._dataset = dataset
        kind = type(dataset) if isinstance(dataset, VisionDataset) else bound_class(dataset)
        self.name = getattr(kind, "__name__", str(kind)).lower()

    def _prepare(self) -> None:
        dataset = self._dataset
        opened = {"train": dataset} if isinstance(dataset, VisionDataset) else open_splits(dataset)
        #: Data set and index of each image that is not a separate file.
        self._items: dict[str, tuple[VisionDataset, int]] = {}
        rows: dict[str, list[tuple[str, int | None]]] = {}
        for split, split_dataset in opened.items():
            labels, names = labels_and_paths(split_dataset, f"{self.name}/{split}")
            if names is None:
                names = [f"{self.name}/{split}/{index:05d}" for index in range(len(split_dataset))]
                self._items.update((name, (split_dataset, index)) for index, name in enumerate(names))
            rows[split] = list(zip(names, labels, strict=True))
        self._set_samples(rows, functools.partial(class_name, opened["train"]))
        del self._dataset  # the command line's factory cannot be pickled

    def content(self, sample: Sample) -> bytes:
        """Bytes of the image file; an image that is not a separate file is encoded as TIFF."""
        if sample.name not in self._items:
            return read_bytes(sample.name)
        file = io.BytesIO()
        image = read_image(*self._items[sample.name], sample.name)
        ImageOps.exif_transpose(image).save(file, "TIFF")  # lossless in every mode
        return file.getvalue()

    def stamp(self, sample: Sample) -> str | None:
        """Stamp of the image file; ``None`` for an image that is not a separate file."""
        return None if sample.name in self._items else stamp(sample.name)
