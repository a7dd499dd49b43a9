"""Extraction: decode and transform images, compute their rows, and write the rows to the store."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from project.data.dataset import ImageLoader, collate
from project.data.sources.base import Source
from project.errors import ProjectError
from project.features.engines import Engine
from project.features.row_index import Keys
from project.features.store import SHARD_BYTES, Space
from project.features.views import View, Views, load_image
from project.runtime.signals import ignore_signals
from project.runtime.system import cores, shared_memory

FLUSH_SECONDS = 15.0  # seconds of work that a killed run may lose
WORKER_BATCH = 32  # images that a worker process decodes at a time; engine batches must be multiples of it
MIN_IMAGES_FOR_WORKERS = 1024  # with fewer, threads are as fast: starting 16 processes takes 0.7 s
PREFETCH_FACTOR = 4  # batches that each worker process decodes ahead

T = TypeVar("T")
R = TypeVar("R")


def compute_rows(
    engine: Engine, images: Sequence[View], load: Callable[[View], torch.Tensor], workers: int = 0
) -> Iterator[tuple[Sequence[View], torch.Tensor]]:
    """Compute the rows of images, in order.

    Decoding and computing together never use more threads than there are cores. A single-threaded engine decodes each
    batch in the thread that computes it. A GPU is fed by threads or processes that decode ahead. An engine that uses
    all cores of a CPU alternates with decoding.

    Args:
        engine: Computes the rows.
        images: Images to compute.
        load: Loads one image, uint8 ``(3, H, W)``; called concurrently from threads or processes.
        workers: Processes that decode for a GPU; 0 for threads. Threads start at once but share the GIL: on 16 cores
            they decode 800 images/s, processes 3,500.

    Yields:
        A batch of images, and its rows.
    """

    def batches() -> Iterator[Sequence[View]]:
        for begin in range(0, len(images), engine.batch_size):
            yield images[begin : begin + engine.batch_size]

    threads = torch.get_num_threads()

    def decode_and_compute(batch: Sequence[View]) -> torch.Tensor:
        return engine(torch.stack([load(image) for image in batch]))

    def start_decoding(batch: Sequence[View]) -> Callable[[], torch.Tensor]:
        parts: Iterable[torch.Tensor]
        if worker_batches is not None:
            parts = worker_batches
        else:
            pending = [pool.submit(load, image) for image in batch]
            parts = (future.result()[None] for future in pending)
        # Concatenated in a separate thread, so that a GPU does not wait for it.
        return collator.submit(_concatenate, parts, len(batch), pin).result

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if engine.single_threaded:
            pool = ThreadPoolExecutor(threads, "engine", torch.set_num_threads, (1,))
            results = prefetched(lambda batch: pool.submit(decode_and_compute, batch).result, batches(), threads)
        else:
            pool = ThreadPoolExecutor(cores(), "decode")
            worker_batches = _decode_in_workers(images, load, workers) if workers else None
            if worker_batches is not None:
                stack.callback(worker_batches.close)
            collator = ThreadPoolExecutor(1, "collate")
            stack.callback(collator.shutdown, cancel_futures=True)
            pin = engine.prefetch > 0 and torch.cuda.is_available()
            results = map(engine, prefetched(start_decoding, batches(), engine.prefetch))
        stack.callback(pool.shutdown, cancel_futures=True)
        yield from zip(batches(), results, strict=True)


def _decode_in_workers(images: Sequence[View], load: Callable[[View], torch.Tensor], workers: int) -> Generator[Any]:
    """Decoded images in order, in batches ``(B, 3, H, W)`` in shared memory.

    The workers are forked in this call, before the threads of the extraction exist: a worker that a thread of a pool
    forks fails or hangs at its exit, when ``concurrent.futures`` joins the threads of its parent.
    """
    loader = ImageLoader(
        _DecodedImages(images, load),
        batch_size=WORKER_BATCH,
        num_workers=workers,
        prefetch_factor=PREFETCH_FACTOR,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
    )
    return iter(loader)


class _DecodedImages(Dataset[torch.Tensor]):
    """Data set for the workers of a DataLoader."""

    def __init__(self, images: Sequence[View], load: Callable[[View], torch.Tensor]) -> None:
        self._images = images
        self._load = load

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor | ProjectError]:
        """Decoded images ``(3, H, W)``, or the error: :class:`~project.data.dataset.ImageLoader` raises it."""
        try:
            return [self._load(self._images[index]) for index in indices]
        except ProjectError as error:
            return [error]


def _concatenate(parts: Iterable[torch.Tensor], count: int, pin: bool) -> torch.Tensor:
    """Take parts until they fill a batch ``(B, 3, H, W)``, page-locked for a GPU; parts never span two batches."""
    batch, filled = torch.empty(0), 0
    for part in parts:
        if filled == 0:
            batch = torch.empty((count, *part.shape[1:]), dtype=part.dtype, pin_memory=pin)
        batch[filled : filled + len(part)] = part
        filled += len(part)
        if filled == count:
            break
    return batch


def prefetched(start: Callable[[T], Callable[[], R]], items: Iterable[T], depth: int) -> Iterator[R]:
    """Results in order, while the next ``depth`` items are being computed."""
    pending: deque[Callable[[], R]] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > depth:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def extract(
    engine: Engine,
    images: Views,
    source: Source,
    space: Space,
    shard_bytes: int = SHARD_BYTES,
    on_batch: Callable[[int], None] = lambda count: None,
    preloaded: dict[bytes, torch.Tensor] | None = None,
) -> None:
    """Compute rows and write them to a space, shard by shard, so that a killed run keeps the written shards.

    Args:
        engine: Computes the rows.
        images: Images to compute, without duplicate keys.
        source: Reads the images.
        space: Where the rows are written.
        shard_bytes: Approximate size of a shard.
        on_batch: Called after each batch with its number of images.
        preloaded: Images that are loaded already, by row key; each is removed when used.

    Raises:
        DataError: An image cannot be read.
        StoreError: The rows cannot be written.
    """
    workers = _worker_count(source, images) if engine.prefetch and engine.batch_size % WORKER_BATCH == 0 else 0
    keys: list[Keys] = []
    count = 0
    rows = torch.empty(0)
    flushed = time.monotonic()

    def flush() -> None:
        nonlocal keys, count, flushed
        if keys:
            space.write(np.concatenate(keys), rows[:count])
        keys, count, flushed = [], 0, time.monotonic()

    def load(view: View) -> torch.Tensor:
        image = preloaded.pop(view.key, None) if preloaded else None
        return load_image(source, view) if image is None else image

    try:
        for batch, computed in compute_rows(engine, images, load, workers):
            if count + len(computed) > len(rows):
                flush()
                size = max(shard_bytes // (computed[0].numel() * computed.element_size()), len(computed))
                if len(rows) < size:
                    rows = torch.empty((size, *computed.shape[1:]), dtype=computed.dtype)
            rows[count : count + len(computed)] = computed
            assert isinstance(batch, Views)  # a slice of the images
            keys.append(batch.keys)
            count += len(computed)
            on_batch(len(batch))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                flush()
    finally:
        flush()


def _worker_count(source: Source, images: Sequence[View]) -> int:
    """Number of processes that decode for a GPU; 0 if threads are better, or processes impossible."""
    # A source with its own prefetch holds open resources that processes cannot share. Without fork, each process would
    # first receive a copy of all images.
    if (
        len(images) < MIN_IMAGES_FOR_WORKERS
        or source.decoder.prefetch is not Source.prefetch
        or multiprocessing.get_start_method() != "fork"
    ):
        return 0
    workers = max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    prefetched_bytes = workers * PREFETCH_FACTOR * WORKER_BATCH * load_image(source, images[0]).numel()
    # A DataLoader hangs when shared memory is full: containers often have only 64 MB.
    return workers if shared_memory() > 2 * prefetched_bytes else 0
