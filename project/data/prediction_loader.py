"""Batches of images to predict. An image that cannot be read is recorded in its batch, or stops the prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from project.data.dataset import ImageLoader
from project.data.sources.base import Sample, Source
from project.data.transforms import evaluation
from project.errors import ProjectError
from project.preprocessing import Preprocessing
from project.runtime.signals import ignore_signals

LOOKED_UP_BYTES = 16 * 2**20  # encoded images in memory, to look up their rows together


class PredictedImages:
    """The images of a batch. Not a collection, so that Lightning does not search it for tensors.

    Args:
        numbers: Index of each image among all images of the command.
        names: Name of each image.
        errors: Why each image cannot be read; empty if it can.
    """

    def __init__(self, numbers: Sequence[int], names: Sequence[str], errors: Sequence[str]) -> None:
        self.numbers = numbers
        self.names = names
        self.errors = errors

    def __len__(self) -> int:
        return len(self.numbers)


class StoredPart(NamedTuple):
    """The images of a batch whose rows are stored.

    Attributes:
        positions: Their positions in the batch.
        rows: Their rows for each group of classifiers that share a frozen prefix, ``(N, ...)``.
    """

    positions: list[int]
    rows: list[torch.Tensor]


class PredictionBatch(NamedTuple):
    """A batch of B images to predict.

    Attributes:
        inputs: Images in each preprocessing, uint8 ``(B, 3, H, W)``; or rows at the cut of each group of classifiers
            that share a frozen prefix, ``(B, ...)``. Those of unreadable images are arbitrary.
        images: Which images these are.
        encoded: Whether the inputs are rows.
        stored: The images that are left out of the inputs, as their rows are stored; ``None`` for none.
        reused: Number of rows that were stored.
    """

    inputs: list[torch.Tensor]
    images: PredictedImages
    encoded: bool = False
    stored: StoredPart | None = None
    reused: int = 0


class PredictionImageSet(Dataset[PredictionBatch]):
    """Data set of batches of images.

    Args:
        samples: N samples.
        source: The source that reads them.
        preprocessings: One or more.
        records_errors: Record why an image cannot be read, instead of raising the error.

    Attributes:
        stored: Finds the images of a batch whose rows are stored, given the contents of the files; these are not
            decoded. ``None`` to decode all.
    """

    def __init__(
        self, samples: Sequence[Sample], source: Source, preprocessings: Sequence[Preprocessing], records_errors: bool
    ) -> None:
        self.samples = samples
        self.source = source
        self._transforms = [evaluation(preprocessing) for preprocessing in preprocessings]
        self._sizes = [preprocessing.crop for preprocessing in preprocessings]
        self._records_errors = records_errors
        self.stored: Callable[[Sequence[bytes]], StoredPart] | None = None

    def load(self, numbers: Sequence[int]) -> PredictionBatch:
        """Read images; decode and transform those whose rows are not stored. Thread-safe.

        Args:
            numbers: Indices of samples.

        Raises:
            ProjectError: An image cannot be read, unless errors are recorded.
        """
        samples = [self.samples[number] for number in numbers]
        errors = [""] * len(samples)
        found: list[StoredPart] = []
        decoded: dict[int, list[torch.Tensor]] = {}
        for contents in self._contents(samples, errors):
            part = self._find(contents)
            found += [part] if part.positions else []
            for position in [position for position in contents if position not in part.positions]:
                with self._recorded(errors, position):
                    decoded[position] = self._transformed(contents[position], samples[position])
        stored = _concatenated(found) if found else None
        missing = [position for position in range(len(samples)) if stored is None or position not in stored.positions]
        inputs = []
        for k, size in enumerate(self._sizes):
            images = torch.zeros(len(missing), 3, size, size, dtype=torch.uint8)
            for image, position in zip(images, missing, strict=True):
                if position in decoded:
                    image.copy_(decoded[position][k])
            inputs.append(images)
        predicted = PredictedImages([*numbers], [sample.name for sample in samples], errors)
        return PredictionBatch(inputs, predicted, stored=stored)

    def _contents(self, samples: Sequence[Sample], errors: list[str]) -> Iterator[dict[int, bytes]]:
        """Contents of the readable files by position: one at a time, or a few to look them up together."""
        contents: dict[int, bytes] = {}
        size = 0
        for position, sample in enumerate(samples):
            with self._recorded(errors, position):
                contents[position] = self.source.content(sample)
                size += len(contents[position])
            if contents and (self.stored is None or size >= LOOKED_UP_BYTES):
                yield contents
                contents, size = {}, 0
        if contents:
            yield contents

    @contextlib.contextmanager
    def _recorded(self, errors: list[str], position: int) -> Iterator[None]:
        """Record why an image cannot be read, if errors are recorded."""
        try:
            yield
        except ProjectError as error:
            if not self._records_errors:
                raise
            errors[position] = _reason(error)

    def _find(self, contents: Mapping[int, bytes]) -> StoredPart:
        """The images whose rows are stored, by their positions."""
        if self.stored is None:
            return StoredPart([], [])
        found, positions = self.stored([*contents.values()]), [*contents]
        return StoredPart([positions[index] for index in found.positions], found.rows)

    def _images(self, sample: Sample) -> list[torch.Tensor]:
        """The image in each transform."""
        return self._transformed(self.source.content(sample), sample)

    def _transformed(self, content: bytes, sample: Sample) -> list[torch.Tensor]:
        """The image in each transform. Each decodes it anew, as a JPEG is decoded at a size that depends on it."""
        return [transform(self.source.decode(content, sample, transform.min_size)) for transform in self._transforms]

    def first_images(self, count: int) -> list[torch.Tensor]:
        """The first readable images in each preprocessing, uint8 ``(N, 3, H, W)``; a black image if there are none.

        Args:
            count: Largest N.
        """
        tensors: list[list[torch.Tensor]] = []
        for number in range(min(2 * count, len(self.samples))):
            with contextlib.suppress(ProjectError):  # recorded or raised when the image is predicted
                tensors.append(self._images(self.samples[number]))
            if len(tensors) == count:
                break
        tensors = tensors or [[torch.zeros(3, size, size, dtype=torch.uint8) for size in self._sizes]]
        return [torch.stack([images[k] for images in tensors]) for k in range(len(self._sizes))]

    def __getitems__(self, numbers: Sequence[int]) -> list[Any]:
        """A single item, the batch. In a worker process, an error is returned as the item: see :class:`ImageLoader`."""
        try:
            self.source.prefetch([self.samples[number] for number in numbers])
            return [self.load(numbers)]
        except ProjectError as error:
            if get_worker_info() is None:
                raise
            return [error]


def _concatenated(parts: Sequence[StoredPart]) -> StoredPart:
    """One part of several, in the order of their positions."""
    positions = [position for part in parts for position in part.positions]
    return StoredPart(positions, [torch.cat(rows) for rows in zip(*(part.rows for part in parts), strict=True)])


def _first(items: list[Any]) -> Any:
    """Collate the single item of :class:`PredictionImageSet`."""
    return items[0]


def _reason(error: ProjectError) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


class BatchNumbers(Sequence[list[int]]):
    """The image numbers of each batch; a batch sampler.

    Args:
        numbers: Image numbers, int64 ``(N,)``.
        batch_size: Images per batch.
    """

    def __init__(self, numbers: np.ndarray, batch_size: int) -> None:
        self._numbers = numbers
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        begin = range(len(self))[index] * self._batch_size
        return self._numbers[begin : begin + self._batch_size].tolist()


class PredictionLoader:
    """Batches of images, or of rows that engines compute from them.

    Args:
        dataset: The images.
        numbers: Numbers of the images to predict, int64 ``(N,)``, ascending.
        batch_size: Images per batch.
        num_workers: Worker processes that decode.
        pin_memory: Whether to copy images to page-locked memory.

    Attributes:
        rows: Maps this loader to batches of rows; ``None`` for batches of images.
        num_workers: Worker processes that decode.
    """

    def __init__(
        self, dataset: PredictionImageSet, numbers: np.ndarray, batch_size: int, num_workers: int, pin_memory: bool
    ) -> None:
        self.dataset = dataset
        self.batches = BatchNumbers(numbers, batch_size)
        self.numbers = numbers
        self.batch_size = batch_size
        self.rows: Callable[[PredictionLoader], Iterator[PredictionBatch]] | None = None
        self.num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Number of batches. At least 1, as Lightning would call no hook of a loop without batches."""
        return max(len(self.batches), 1)

    def __iter__(self) -> Iterator[PredictionBatch]:
        yield from self.images() if self.rows is None else self.rows(self)

    def sample(self, count: int) -> list[bytes]:
        """Contents of evenly spaced files, without those that cannot be read.

        Args:
            count: Number of files.
        """
        contents = []
        for number in self.numbers[:: max(len(self.numbers) // count, 1)][:count]:
            with contextlib.suppress(ProjectError):  # recorded or raised when the image is predicted
                contents.append(self.dataset.source.content(self.dataset.samples[number]))
        return contents

    def images(self) -> Iterable[PredictionBatch]:
        """Batches of images, decoded by worker processes."""
        loader: DataLoader[Any] = ImageLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=self.num_workers if len(self.batches) > 1 else 0,
            collate_fn=_first,
            worker_init_fn=ignore_signals,
            pin_memory=self._pin_memory,
        )
        return loader
