"""Views of images: an image, a transform, and the key of the resulting row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from project.data.image_index import Index
from project.data.image_io import DECODING
from project.data.sources.base import Sample, Source, decoder_name
from project.data.transforms import SeededRandom, Transform
from project.errors import DataError
from project.features.row_index import Keys
from project.features.store import as_keys, row_key
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import seed_from_digest
from project.runtime.system import cache_folder

CHUNK = 1 << 14  # keys to compute at a time


@dataclass(frozen=True)
class View:
    """One view of an image.

    Attributes:
        sample: The image's sample.
        transform: Maps the image to uint8 ``(3, H, W)``.
        description: What the key depends on besides the image: decoder, transform, and number of the view.
        key: Key of the row; also seeds the random parts of the transform.
    """

    sample: Sample
    transform: Transform
    description: str
    key: bytes


class Views(Sequence[View]):
    """Views stored as arrays: a million take 22 MB, a tenth of a list of objects.

    Args:
        samples: N samples.
        transforms: Transforms in use, each with its description (see :class:`View`).
        keys: Keys of M rows, uint64 ``(M, 2)``.
        sample: Index of each view's sample, int32 ``(M,)``.
        transform: Index of each view's transform, int16 ``(M,)``.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transforms: Sequence[tuple[Transform, str]],
        keys: Keys,
        sample: np.ndarray,
        transform: np.ndarray,
    ) -> None:
        self.samples = samples
        self.transforms = transforms
        self.keys = keys
        self.sample = sample
        self.transform = transform

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> Views: ...
    def __getitem__(self, index: int | slice) -> View | Views:
        if isinstance(index, slice):
            return self.take(index)
        transform, description = self.transforms[self.transform[index]]
        return View(self.samples[self.sample[index]], transform, description, self.keys[index].astype("<u8").tobytes())

    def take(self, indices: np.ndarray | slice) -> Views:
        """Subset of the views.

        Args:
            indices: Indices, a mask or a slice.
        """
        return Views(self.samples, self.transforms, self.keys[indices], self.sample[indices], self.transform[indices])


def digest_images(source: Source, samples: Sequence[Sample], ranks: ProcessGroup) -> np.ndarray:
    """SHA-256 of each image's bytes, from the image index or by reading the image; the work is split over the ranks.

    Returns:
        uint8 ``(N, 32)``.

    Raises:
        DataError: A file cannot be read.
    """
    part = np.empty((0, 32), np.uint8)
    with ranks.propagate_errors():
        part = Index(cache_folder()).digests(source, samples[ranks.rank_slice(len(samples))])
    return np.concatenate(ranks.gather(part))


def image_views(
    source: Source,
    samples: Sequence[Sample],
    digests: Sequence[bytes] | np.ndarray,
    transform: Transform,
    names: Sequence[str],
) -> list[Views]:
    """Views of all images, one element per view.

    Args:
        source: Decodes the images; the decoder's name is part of the keys.
        samples: N samples.
        digests: Digest of each sample, 32 bytes.
        transform: Transform of all views; its ``repr`` contains all parameters.
        names: V distinct names of the views.

    Returns:
        V elements of length N.
    """
    views = []
    for name in names:
        description = view_description(source, transform, name)
        keys = np.empty((len(samples), 2), np.uint64)
        for begin in range(0, len(samples), CHUNK):
            chunk = digests[begin : begin + CHUNK]
            keys[begin : begin + CHUNK] = as_keys([row_key(bytes(digest), description) for digest in chunk])
        indices = np.arange(len(samples), dtype=np.int32)
        views.append(Views(samples, [(transform, description)], keys, indices, np.zeros(len(samples), np.int16)))
    return views


def view_description(source: Source, transform: Transform, name: str = "") -> str:
    """What the keys of views depend on besides the images.

    Args:
        source: Decodes the images.
        transform: Its ``repr`` contains all parameters.
        name: Name of the view; empty for the image itself.
    """
    return f"{decoder_name(source)} {DECODING} {transform!r} {name}"


def deduplicate(groups: Sequence[Sequence[Views]]) -> tuple[Views, list[list[np.ndarray]]]:
    """Merge groups of views and keep each key once.

    All views of an image are adjacent, so that its source is read sequentially, once.

    Args:
        groups: Groups of views; all views of a group have the same samples.

    Returns:
        The distinct views, and for each view of each group its indices into them, int32 ``(N,)``.
    """
    samples: list[Sample] = []
    transforms: list[tuple[Transform, str]] = []
    total = sum(len(group) * len(group[0]) for group in groups)
    merged = Views(
        samples, transforms, np.empty((total, 2), np.uint64), np.empty(total, np.int32), np.empty(total, np.int16)
    )
    parts: list[slice] = []
    for group in groups:
        begin = parts[-1].stop if parts else 0
        parts.append(slice(begin, begin + len(group) * len(group[0])))
        for number, views in enumerate(group):
            target = slice(begin + number, parts[-1].stop, len(group))
            merged.keys[target] = views.keys
            merged.sample[target] = views.sample + len(samples)
            merged.transform[target] = views.transform + len(transforms)
            transforms += views.transforms
        samples += group[0].samples
    first, position = _first_occurrences(merged.keys)
    positions = [
        [np.ascontiguousarray(position[part][number :: len(group)]) for number in range(len(group))]
        for group, part in zip(groups, parts, strict=True)
    ]
    return merged if first is None else merged.take(first), positions


def _first_occurrences(keys: Keys) -> tuple[np.ndarray | None, np.ndarray]:
    """Mask of first occurrences, bool ``(M,)``, and index of each key among those, int32 ``(M,)``.

    The mask is ``None`` if all keys are distinct; that common case takes less memory.
    """
    high = keys[:, 0].copy()
    high.sort()
    if not (high[1:] == high[:-1]).any():
        return None, np.arange(len(keys), dtype=np.int32)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys keep their order
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    first = np.zeros(len(keys), bool)
    first[order[begins]] = True
    rank = np.cumsum(first, dtype=np.int32) - 1
    position = np.empty(len(keys), np.int32)
    position[order] = rank[order[begins]][np.cumsum(begins) - 1]
    return first, position


def load_image(source: Source, view: View) -> torch.Tensor:
    """Read, decode and transform a view: uint8 ``(3, H, W)``.

    Raises:
        DataError: The image cannot be read, or was changed after its key was computed.
    """
    content = source.content(view.sample)
    if row_key(hashlib.sha256(content).digest(), view.description) != view.key:
        raise DataError(f"{view.sample.name} was changed while its features were computed. Run again.")
    image = source.decode(content, view.sample, view.transform.min_size)
    with SeededRandom(seed_from_digest(view.key)):
        return view.transform(image)
