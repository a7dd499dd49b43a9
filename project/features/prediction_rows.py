"""Rows of images to predict: decoding and engines overlap, in constant memory."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from project.data.prediction_loader import PredictionBatch, PredictionLoader
from project.features.engines import Engine
from project.features.extraction import prefetched


@dataclass(frozen=True)
class PrefixEngine:
    """The engine of a frozen prefix.

    Attributes:
        engine: Computes the rows.
        preprocessing: Index of the preprocessing of its images.
    """

    engine: Engine
    preprocessing: int


def encoded_batches(loader: PredictionLoader, engines: Sequence[PrefixEngine]) -> Iterator[PredictionBatch]:
    """Compute the rows of a loader's images, in order.

    If all engines are single-threaded, as on a CPU, each core decodes and computes a batch of its own. Otherwise worker
    processes decode, and the engines compute several of their batches at once; for a GPU, a thread concatenates these.

    Args:
        loader: Batches of images.
        engines: One for each group of classifiers that share a frozen prefix.

    Yields:
        The loader's batches, with the rows of each group.
    """
    if all(item.engine.single_threaded for item in engines):
        yield from _in_threads(loader, engines)
    else:
        yield from _in_large_batches(loader, engines)


def _in_threads(loader: PredictionLoader, engines: Sequence[PrefixEngine]) -> Iterator[PredictionBatch]:
    threads = torch.get_num_threads()

    def decode_and_compute(numbers: list[int]) -> PredictionBatch:
        batch = loader.dataset.load(numbers)
        return _encoded(batch, [_rows(item, batch.inputs[item.preprocessing]) for item in engines])

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        pool = ThreadPoolExecutor(threads, "engine", torch.set_num_threads, (1,))
        stack.callback(pool.shutdown, cancel_futures=True)
        batches = (loader.batches[index] for index in range(len(loader.batches)))
        yield from prefetched(lambda numbers: pool.submit(decode_and_compute, numbers).result, batches, threads + 1)


def _in_large_batches(loader: PredictionLoader, engines: Sequence[PrefixEngine]) -> Iterator[PredictionBatch]:
    # Forked before the thread exists.
    small = iter(loader.images())
    size = max(1, min(item.engine.batch_size for item in engines) // loader.batch_size)
    depth = max(item.engine.prefetch for item in engines)
    pin = depth > 0 and torch.cuda.is_available()

    def collect() -> tuple[list[torch.Tensor], list[int], list[PredictionBatch]]:
        """A large batch of images in each preprocessing; the small batches of it, without images, and their lengths."""
        batches = [*itertools.islice(small, size)]
        stacked = [_concatenate(tensors, pin) for tensors in zip(*(batch.inputs for batch in batches), strict=True)]
        lengths = [len(batch.inputs[0]) for batch in batches]
        return stacked, lengths, [batch._replace(inputs=[]) for batch in batches]

    count = -(-len(loader.batches) // size)
    with contextlib.ExitStack() as stack:
        close = getattr(small, "close", None)
        if close is not None:
            stack.callback(close)
        if depth:
            collector = ThreadPoolExecutor(1, "collect")
            stack.callback(collector.shutdown, cancel_futures=True)
            # If a signal interrupted the start of the thread by its first work, shutdown would not wait for it.
            collector.submit(int).result()
            large = prefetched(lambda _: collector.submit(collect).result, range(count), depth)
        else:
            large = (collect() for _ in range(count))
        for inputs, lengths, batches in large:
            rows = [_rows(item, inputs[item.preprocessing]) for item in engines]
            for batch, *parts in zip(batches, *(torch.split(tensor, lengths) for tensor in rows), strict=True):
                yield _encoded(batch, parts)


def _encoded(batch: PredictionBatch, computed: Sequence[torch.Tensor]) -> PredictionBatch:
    """A batch of rows, of which some are stored and the others were computed.

    Args:
        batch: The images.
        computed: For each group of classifiers, the rows of the images whose rows are not stored, in their order.
    """
    stored = batch.stored
    if stored is None:
        return batch._replace(inputs=[*computed], encoded=True)
    missing = [position for position in range(len(batch.images)) if position not in stored.positions]
    order = torch.tensor([*missing, *stored.positions]).argsort()
    parts = zip(computed, stored.rows, strict=True)
    rows = [torch.cat([new.to(old), old])[order] if missing else old[order] for new, old in parts]
    return batch._replace(inputs=rows, encoded=True, stored=None, reused=len(stored.positions))


def _concatenate(tensors: Sequence[torch.Tensor], pin: bool) -> torch.Tensor:
    """Concatenate images ``(B, 3, H, W)``, in page-locked memory for a GPU."""
    if len(tensors) == 1 and not pin:
        return tensors[0]
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    return torch.cat([*tensors], out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin))


def _rows(item: PrefixEngine, images: torch.Tensor) -> torch.Tensor:
    """Rows of images, in calls of the engine's batch size; without images, an empty tensor."""
    if not len(images):
        return torch.empty(0)
    parts = [item.engine(part) for part in torch.split(images, item.engine.batch_size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decoding_processes(given: int | None, default: int, available: int) -> int:
    """Worker processes that decode for a GPU: those that the user has set, else one for each core.

    Args:
        given: The number that the user has set.
        default: Number to use where processes cannot be forked.
        available: Cores of this machine.
    """
    if given is not None:
        return given
    if multiprocessing.get_start_method() != "fork":
        return default
    return max(available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
