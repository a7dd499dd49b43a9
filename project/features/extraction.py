"""The prefix over images: decoded, transformed, computed, and written as it goes."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from project.data.image_io import DECODING
from project.data.sources.base import Sample, Source, decoder_name
from project.data.transforms import Drawn, Transform
from project.errors import DataError
from project.features.engines import Engine
from project.features.store import SHARD, Keys, Space, as_keys, row_key
from project.runtime.distributed import Ranks
from project.runtime.seeding import seed_of
from project.runtime.system import cores

FLUSH = 15.0  # seconds of work that a killed run may lose

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Image:
    """A view of an image, of which a row is to be had.

    Attributes:
        sample: Whose image.
        digest: SHA-256 of the bytes that the image is made from.
        transform: From the image to uint8 ``(3, H, W)``.
        key: Of its row; what is random in the transform is drawn from it.
    """

    sample: Sample
    digest: bytes
    transform: Transform
    key: bytes


def digest_all(source: Source, samples: Sequence[Sample], ranks: Ranks) -> list[bytes]:
    """SHA-256 of the bytes that each sample's image is made from; those that the source does not know are read.

    Each is read by one process, in order.

    Raises:
        DataError: A file cannot be read.
    """
    digests = [source.digest(sample) or b"" for sample in samples]
    unknown = [at for at, digest in enumerate(digests) if not digest]
    mine: list[bytes] = []
    with ranks.together(), ThreadPoolExecutor(cores()) as pool:
        part = [samples[at] for at in unknown[ranks.part(len(unknown))]]
        for at in range(0, len(part), 4096):  # a pool holds all that it is given at once
            mine += pool.map(lambda sample: hashlib.sha256(source.content(sample)).digest(), part[at : at + 4096])
    read = itertools.chain.from_iterable(ranks.gather(mine))
    for at, digest in zip(unknown, read, strict=True):
        digests[at] = digest
    return digests


def views_of(
    source: Source, samples: Sequence[Sample], digests: Sequence[bytes], transform: Transform, views: Sequence[str]
) -> list[list[Image]]:
    """The images of each view, ``[V][N]``.

    Args:
        source: What decodes them: another decoder makes other images of the same bytes.
        samples: N samples.
        digests: Their digests.
        transform: The same for all; its ``repr`` has all its parameters.
        views: What tells one view from another; V different words.
    """
    texts = [f"{decoder_name(source)} {DECODING} {transform!r} {view}" for view in views]
    return [
        [
            Image(sample, digest, transform, row_key(digest, text))
            for sample, digest in zip(samples, digests, strict=True)
        ]
        for text in texts
    ]


def load_image(source: Source, image: Image) -> torch.Tensor:
    """Read, decode and transform a view: uint8 ``(3, H, W)``.

    Raises:
        DataError: It cannot be read, or is no longer what it was.
    """
    content = source.content(image.sample)
    if hashlib.sha256(content).digest() != image.digest:
        raise DataError(f"{image.sample.name} was changed while its features were computed. Run again.")
    picture = source.decode(content, image.sample, image.transform.enough)
    with Drawn(seed_of(image.key)):
        return image.transform(picture)


def run(
    engine: Engine, images: Sequence[Image], load: Callable[[Image], torch.Tensor]
) -> Iterator[tuple[Sequence[Image], torch.Tensor]]:
    """Compute the rows of images, in order.

    Decoding and computing never have more threads than there are cores: an engine whose calls run side by side decodes
    a batch on the thread that computes it; a GPU is fed by threads that decode ahead of it; and one that takes all
    cores of a CPU at once takes turns with the decoding.

    Args:
        engine: What computes.
        images: What of.
        load: Reads one, uint8 ``(3, H, W)``; called from several threads.

    Yields:
        A batch of images, and its rows.
    """
    batches = [images[at : at + engine.batch_size] for at in range(0, len(images), engine.batch_size)]
    threads = torch.get_num_threads()

    def lane(batch: Sequence[Image]) -> torch.Tensor:
        return engine(torch.stack([load(image) for image in batch]))

    def decode(batch: Sequence[Image]) -> Callable[[], torch.Tensor]:
        pending = [pool.submit(load, image) for image in batch]
        return lambda: torch.stack([future.result() for future in pending])

    if engine.side_by_side:
        pool = ThreadPoolExecutor(threads, "lane", torch.set_num_threads, (1,))
        results = _ahead(lambda batch: pool.submit(lane, batch).result, batches, threads)
    else:
        pool = ThreadPoolExecutor(cores(), "decode")
        results = map(engine, _ahead(decode, batches, engine.ahead))
    try:
        yield from zip(batches, results, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


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
    images: Sequence[Image],
    source: Source,
    space: Space,
    shard: int = SHARD,
    done: Callable[[int], None] = lambda count: None,
) -> None:
    """Compute rows and write them to a space, some at a time: what is written when a run is killed is not lost.

    Args:
        engine: What computes.
        images: What of, each key once.
        source: Reads them.
        space: Where the rows go.
        shard: Bytes to write at a time, about.
        done: Told of each batch how many images it had.

    Raises:
        DataError: An image cannot be read.
        StoreError: The rows cannot be written.
    """
    keys: list[bytes] = []
    rows = torch.empty(0)
    written = time.monotonic()

    def flush() -> None:
        nonlocal keys, written
        if keys:
            space.write(as_keys(keys), rows[: len(keys)])
        keys, written = [], time.monotonic()

    try:
        for batch, computed in run(engine, images, lambda image: load_image(source, image)):
            if len(keys) + len(computed) > len(rows):
                flush()
                size = max(shard // (computed[0].numel() * computed.element_size()), len(computed))
                if len(rows) < size:
                    rows = torch.empty((size, *computed.shape[1:]), dtype=computed.dtype)
            rows[len(keys) : len(keys) + len(computed)] = computed
            keys += [image.key for image in batch]
            done(len(batch))
            if time.monotonic() - written > FLUSH:
                flush()
    finally:
        flush()


def keys_of(images: Iterable[Image]) -> Keys:
    """The keys of images, uint64 ``(N, 2)``."""
    return as_keys([image.key for image in images])
