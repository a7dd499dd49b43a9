"""The prefix over images: decoded, transformed, computed, and written as it goes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from project.data.dataset import ImageLoader, collate
from project.data.image_index import Index
from project.data.image_io import DECODING
from project.data.sources.base import Sample, Source, decoder_name
from project.data.transforms import SeededRandom, Transform
from project.errors import DataError, ProjectError
from project.features.engines import Engine
from project.features.row_index import Keys
from project.features.store import SHARD, Space, as_keys, row_key
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import seed_of
from project.runtime.signals import ignore_signals
from project.runtime.system import cache_folder, cores, shared_memory

FLUSH = 15.0  # seconds of work that a killed run may lose
PART = 32  # images that a process decodes at a time; batches of a GPU are multiples of it
MANY = 1024  # images: threads take about as long for these as processes with their start, 0.7 s for 16 of them
PREFETCH = 4  # parts that each process decodes ahead
CHUNK = 1 << 14  # keys that are made at a time

T = TypeVar("T")
R = TypeVar("R")


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


def load_once(source: Source, known: dict[bytes, torch.Tensor], view: View) -> torch.Tensor:
    """The same, but that images which were read before, to measure an engine, are not read again.

    Args:
        source: Reads the image.
        known: Images by the keys of their rows; each is taken out as it is used.
        view: Which.
    """
    image = known.pop(view.key, None)
    return load_image(source, view) if image is None else image


def run(
    engine: Engine, images: Sequence[View], load: Callable[[View], torch.Tensor], workers: int = 0
) -> Iterator[tuple[Sequence[View], torch.Tensor]]:
    """Compute the rows of images, in order.

    Decoding and computing never have more threads than there are cores: an engine whose calls run side by side decodes
    a batch on the thread that computes it; a GPU is fed by threads or processes that decode ahead of it; and one that
    takes all cores of a CPU at once takes turns with the decoding.

    Args:
        engine: What computes.
        images: What of.
        load: Reads one, uint8 ``(3, H, W)``; called from several threads or processes.
        workers: Processes that decode ahead of a GPU; 0 for threads. Threads start at once but share one interpreter
            lock: on 16 cores they decode 800 images/s, where processes decode 3,500.

    Yields:
        A batch of images, and its rows.
    """

    def batches() -> Iterator[Sequence[View]]:
        for at in range(0, len(images), engine.batch_size):
            yield images[at : at + engine.batch_size]

    threads = torch.get_num_threads()

    def lane(batch: Sequence[View]) -> torch.Tensor:
        return engine(torch.stack([load(image) for image in batch]))

    def decode(batch: Sequence[View]) -> Callable[[], torch.Tensor]:
        parts = from_processes
        if parts is None:
            pending = [pool.submit(load, image) for image in batch]
            parts = (future.result()[None] for future in pending)
        # Put together on a thread of its own, so that a GPU does not wait for it.
        return together.submit(_fill, parts, len(batch), pin).result

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if engine.side_by_side:
            pool = ThreadPoolExecutor(threads, "lane", torch.set_num_threads, (1,))
            results = _ahead(lambda batch: pool.submit(lane, batch).result, batches(), threads)
        else:
            pool = ThreadPoolExecutor(cores(), "decode")
            from_processes = _from_processes(images, load, workers) if workers else None
            if from_processes is not None:
                stack.callback(from_processes.close)
            together = ThreadPoolExecutor(1, "together")
            stack.callback(together.shutdown, cancel_futures=True)
            pin = engine.ahead > 0 and torch.cuda.is_available()
            results = map(engine, _ahead(decode, batches(), engine.ahead))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield from zip(batches(), results, strict=True)


def _from_processes(
    images: Sequence[View], load: Callable[[View], torch.Tensor], workers: int
) -> Generator[torch.Tensor]:
    """Decoded images ``(B, 3, H, W)`` in order, a few at a time: what is under way lies in shared memory."""
    yield from ImageLoader(
        _Decoded(images, load),
        batch_size=PART,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
    )


class _Decoded(Dataset[torch.Tensor]):
    """Decoded images, for the processes of a DataLoader."""

    def __init__(self, images: Sequence[View], load: Callable[[View], torch.Tensor]) -> None:
        self._images = images
        self._load = load

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor | ProjectError]:
        """Decoded images ``(3, H, W)``; an error is an item: see :class:`~project.data.dataset.ImageLoader`."""
        try:
            return [self._load(self._images[index]) for index in indices]
        except ProjectError as error:
            return [error]


def _fill(parts: Iterable[torch.Tensor], count: int, pin: bool) -> torch.Tensor:
    """The next so many images as one batch ``(B, 3, H, W)``, page-locked for a GPU; parts end where batches do."""
    batch, at = torch.empty(0), 0
    for part in parts:
        if at == 0:
            batch = torch.empty((count, *part.shape[1:]), dtype=part.dtype, pin_memory=pin)
        batch[at : at + len(part)] = part
        at += len(part)
        if at == count:
            break
    return batch


def _ahead(start: Callable[[T], Callable[[], R]], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in order, while so many of the next items are under way."""
    waiting: deque[Callable[[], R]] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) > ahead:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def extract(
    engine: Engine,
    images: Views,
    source: Source,
    space: Space,
    shard: int = SHARD,
    done: Callable[[int], None] = lambda count: None,
    known: dict[bytes, torch.Tensor] | None = None,
) -> None:
    """Compute rows and write them to a space, some at a time: what is written when a run is killed is not lost.

    Args:
        engine: What computes.
        images: What of, each key once.
        source: Reads them.
        space: Where the rows go.
        shard: Bytes to write at a time, about.
        done: Called after each batch with its number of images.
        known: Images that are read already, by the keys of their rows.

    Raises:
        DataError: An image cannot be read.
        StoreError: The rows cannot be written.
    """
    workers = _workers(source, images) if engine.ahead and engine.batch_size % PART == 0 else 0
    keys: list[Keys] = []
    count = 0
    rows = torch.empty(0)
    written = time.monotonic()

    def flush() -> None:
        nonlocal keys, count, written
        if keys:
            space.write(np.concatenate(keys), rows[:count])
        keys, count, written = [], 0, time.monotonic()

    try:
        for batch, computed in run(engine, images, functools.partial(load_once, source, known or {}), workers):
            if count + len(computed) > len(rows):
                flush()
                size = max(shard // (computed[0].numel() * computed.element_size()), len(computed))
                if len(rows) < size:
                    rows = torch.empty((size, *computed.shape[1:]), dtype=computed.dtype)
            rows[count : count + len(computed)] = computed
            assert isinstance(batch, Views)  # a part of the images
            keys.append(batch.keys)
            count += len(computed)
            done(len(batch))
            if time.monotonic() - written > FLUSH:
                flush()
    finally:
        flush()


def _workers(source: Source, images: Sequence[View]) -> int:
    """How many processes decode for a GPU; 0 where threads are better, or all that there can be."""
    # A source whose reads depend on each other has something open that processes cannot share; and where processes do
    # not begin as forks, each would get a copy of all images first.
    if (
        len(images) < MANY
        or source.decoder.prefetch is not Source.prefetch
        or multiprocessing.get_start_method() != "fork"
    ):
        return 0
    workers = max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    under_way = workers * PREFETCH * PART * load_image(source, images[0]).numel()
    # Where it does not fit, as in containers with 64 MB of it, a DataLoader waits for ever.
    return workers if shared_memory() > 2 * under_way else 0
