"""Views of images: each is an image with a transform, and the key of its row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
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
from project.runtime.seeding import seed_of
from project.runtime.system import cache_folder

CHUNK = 1 << 14  # keys that are made at a time


@dataclass(frozen=True)
class View:
    """A view of an image, of which a row is to be had.

    Attributes:
        sample: Whose image.
        transform: From the image to uint8 ``(3, H, W)``.
        text: What the key tells besides the image: its decoder, the transform, and which view it is.
        key: Of its row; what is random in the transform is drawn from it.
    """

    sample: Sample
    transform: Transform
    text: str
    key: bytes


class Views(Sequence[View]):
    """Views of images as arrays: a million of them take 22 MB, where objects take hundreds.

    Args:
        samples: N samples.
        kinds: The transforms that are used, each with the text of its keys.
        keys: Keys of M rows, uint64 ``(M, 2)``.
        sample: Index of each view's sample, int32 ``(M,)``.
        kind: Index of each view's transform, int16 ``(M,)``.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        kinds: Sequence[tuple[Transform, str]],
        keys: Keys,
        sample: np.ndarray,
        kind: np.ndarray,
    ) -> None:
        self.samples = samples
        self.kinds = kinds
        self.keys = keys
        self.sample = sample
        self.kind = kind

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[View]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> Views: ...
    def __getitem__(self, index: int | slice) -> View | Views:
        if isinstance(index, slice):
            return self.take(index)
        transform, text = self.kinds[self.kind[index]]
        return View(self.samples[self.sample[index]], transform, text, self.keys[index].astype("<u8").tobytes())

    def take(self, which: np.ndarray | slice) -> Views:
        """Some of the views.

        Args:
            which: Their indices, or a mask.
        """
        return Views(self.samples, self.kinds, self.keys[which], self.sample[which], self.kind[which])


def digest_images(source: Source, samples: Sequence[Sample], ranks: ProcessGroup) -> np.ndarray:
    """SHA-256 of the bytes that each sample's image is made from; those that nothing knows yet are read.

    Each is looked up or read by one process. What is read is remembered in the index of images.

    Returns:
        uint8 ``(N, 32)``.

    Raises:
        DataError: A file cannot be read.
    """
    mine = np.empty((0, 32), np.uint8)
    with ranks.together():
        mine = Index(cache_folder()).digests(source, samples[ranks.part(len(samples))])
    return np.concatenate(ranks.gather(mine))


def image_views(
    source: Source,
    samples: Sequence[Sample],
    digests: Sequence[bytes] | np.ndarray,
    transform: Transform,
    views: Sequence[str],
) -> list[Views]:
    """The images of each view, ``[V][N]``.

    Args:
        source: What decodes them: another decoder makes other images of the same bytes.
        samples: N samples.
        digests: Their digests, 32 bytes each.
        transform: The same for all; its ``repr`` has all its parameters.
        views: What tells one view from another; V different words.
    """
    found = []
    for view in views:
        text = f"{decoder_name(source)} {DECODING} {transform!r} {view}"
        keys = np.empty((len(samples), 2), np.uint64)
        for begin in range(0, len(samples), CHUNK):
            part = digests[begin : begin + CHUNK]
            keys[begin : begin + CHUNK] = as_keys([row_key(bytes(digest), text) for digest in part])
        places = np.arange(len(samples), dtype=np.int32)
        found.append(Views(samples, [(transform, text)], keys, places, np.zeros(len(samples), np.int16)))
    return found


def distinct(groups: Sequence[Sequence[Views]]) -> tuple[Views, list[list[np.ndarray]]]:
    """Put views together, each key once.

    All views of an image come together, so that what it is read from is passed over once.

    Args:
        groups: Of views of the same samples.

    Returns:
        The views, and where each view of each group is among them: int32 ``(N,)``.
    """
    samples: list[Sample] = []
    kinds: list[tuple[Transform, str]] = []
    total = sum(len(group) * len(group[0]) for group in groups)
    whole = Views(samples, kinds, np.empty((total, 2), np.uint64), np.empty(total, np.int32), np.empty(total, np.int16))
    parts: list[slice] = []
    for group in groups:
        begin = parts[-1].stop if parts else 0
        parts.append(slice(begin, begin + len(group) * len(group[0])))
        for number, views in enumerate(group):
            which = slice(begin + number, parts[-1].stop, len(group))
            whole.keys[which] = views.keys
            whole.sample[which] = views.sample + len(samples)
            whole.kind[which] = views.kind + len(kinds)
            kinds += views.kinds
        samples += group[0].samples
    first, place = _first_of_each(whole.keys)
    places = [
        [np.ascontiguousarray(place[part][number :: len(group)]) for number in range(len(group))]
        for group, part in zip(groups, parts, strict=True)
    ]
    return whole if first is None else whole.take(first), places


def _first_of_each(keys: Keys) -> tuple[np.ndarray | None, np.ndarray]:
    """Which keys come for the first time, bool ``(M,)``, and which of those each one is, int32 ``(M,)``.

    The former is ``None`` where each comes once, which is seen without the memory that the general case takes.
    """
    high = keys[:, 0].copy()
    high.sort()
    if not (high[1:] == high[:-1]).any():
        return None, np.arange(len(keys), dtype=np.int32)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal ones stay in their order
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    first = np.zeros(len(keys), bool)
    first[order[begins]] = True
    rank = np.cumsum(first, dtype=np.int32) - 1
    place = np.empty(len(keys), np.int32)
    place[order] = rank[order[begins]][np.cumsum(begins) - 1]
    return first, place


def load_image(source: Source, view: View) -> torch.Tensor:
    """Read, decode and transform a view: uint8 ``(3, H, W)``.

    Raises:
        DataError: It cannot be read, or is no longer what it was.
    """
    content = source.content(view.sample)
    if row_key(hashlib.sha256(content).digest(), view.text) != view.key:
        raise DataError(f"{view.sample.name} was changed while its features were computed. Run again.")
    picture = source.decode(content, view.sample, view.transform.min_size)
    with SeededRandom(seed_of(view.key)):
        return view.transform(picture)
