"""The prefix over images: decoded, transformed, computed, and written as it goes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from project.data.dataset import ImageLoader, collate
from project.data.sources.base import Source
from project.errors import ProjectError
from project.features.engines import Engine
from project.features.row_index import Keys
from project.features.store import SHARD, Space
from project.features.views import View, Views, load_image
from project.runtime.signals import ignore_signals
from project.runtime.system import cores, shared_memory

FLUSH = 15.0  # seconds of work that a killed run may lose
PART = 32  # images that a process decodes at a time; batches of a GPU are multiples of it
MANY = 1024  # images: threads take about as long for these as processes with their start, 0.7 s for 16 of them
PREFETCH = 4  # parts that each process decodes ahead

T = TypeVar("T")
R = TypeVar("R")


def load_once(source: Source, known: dict[bytes, torch.Tensor], view: View) -> torch.Tensor:
    """Read, decode and transform a view, uint8 ``(3, H, W)``; images that measured an engine are not read again.

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
