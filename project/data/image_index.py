"""What is to be known of each image: read once, whole, and kept under its content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import Image

from project.data.image_io import open_image, traits
from project.data.sources.base import Sample, Source, decoder_name
from project.errors import DataError
from project.runtime.system import cores

T = TypeVar("T")
SIDE = 16  # of the thumbnail
FILE = "images-3.sqlite"  # another number for other columns
VERSION = f"3 pillow {PIL.__version__}"  # of what is kept: another Pillow may read what this one cannot


class ImageInfo(NamedTuple):
    """What is known of an image.

    Attributes:
        digest: SHA-256 of its bytes; empty if they cannot be had.
        error: Why it cannot be decoded, without its name; empty if it can.
        kind: A word or two for the error.
        width: Pixels, as stored.
        height: Pixels, as stored.
        traits: What is out of the ordinary, and taken care of when it is decoded.
        phash: Its perceptual hash, 64 bits; 0 if it cannot be decoded.
        thumbnail: ``SIDE * SIDE`` grey values.
        colour: Mean of red, green and blue.
    """

    digest: bytes
    error: str = ""
    kind: str = ""
    width: int = 0
    height: int = 0
    traits: tuple[str, ...] = ()
    phash: int = 0
    thumbnail: bytes = b""
    colour: bytes = b""


def examine(
    source: Source, sample: Sample, kept: Callable[[bytes], ImageInfo | None] = lambda digest: None
) -> ImageInfo:
    """Read an image whole, unless its content is known.

    Args:
        source: Reads it.
        sample: Whose image.
        kept: Gives what is kept of content with a SHA-256.
    """
    digest = source.digest(sample)
    known = kept(digest) if digest else None
    if known is not None:
        return known
    try:
        content = source.content(sample)
    except DataError as error:
        return ImageInfo(b"", _about(error, sample), "unreadable")
    digest = hashlib.sha256(content).digest()
    known = kept(digest)
    if known is not None:
        return known
    width = height = 0
    found: tuple[str, ...] = ()
    kind = "not an image"
    try:
        with contextlib.suppress(Exception), open_image(content) as header:
            kind = "damaged"
            width, height = header.size
            found = tuple(traits(header))
        image = source.decode(content, sample, min_size=4 * SIDE)
    except DataError as error:
        if not content:
            kind = "empty"
        elif isinstance(error.__cause__, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            kind = "too large"
        elif "truncated" in str(error.__cause__):  # as Pillow says it
            kind = "truncated"
        return ImageInfo(digest, _about(error, sample), kind, width, height, found)
    if not width:  # a source that decodes in a way of its own
        width, height = image.size
    return ImageInfo(digest, "", "", width, height, found, *looks(image))


def _about(error: DataError, sample: Sample) -> str:
    """What an error says of a sample whose name is known."""
    return f"{error.reason} {error.hint}".strip() if error.path == sample.name else str(error)


def _cosines(size: int, most: int) -> np.ndarray:
    """The first rows of the matrix of a discrete cosine transform."""
    at = np.arange(size)
    return np.cos(np.pi * (2 * at + 1) * np.arange(most)[:, None] / (2 * size)).astype(np.float32)


COSINES = _cosines(32, 8)


def looks(image: Image.Image) -> tuple[int, bytes, bytes]:
    """What an image looks like.

    The perceptual hash is that of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010):
    the signs, about their median, of the 64 lowest frequencies of the grey image at 32 x 32 pixels.

    Args:
        image: In RGB.

    Returns:
        The hash, a grey thumbnail, and the mean colour.
    """
    tiny = image.resize((32, 32), Image.Resampling.BOX)
    small = tiny.convert("L")
    frequencies = (COSINES @ np.asarray(small, np.float32) @ COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), small.reduce(2).tobytes(), tiny.reduce(32).tobytes()


class Index:
    """Facts that are kept, for all data of this user: what has been read once is not read again.

    An image is known by its content, and a file by its path, size, time and inode, so that what is known of an
    unchanged file is had without reading it. A file that cannot be used or written is done without.

    Args:
        folder: Where it is kept; ``None`` for in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None
        if folder is not None:
            with contextlib.suppress(OSError):  # then it cannot be opened either
                folder.mkdir(parents=True, exist_ok=True)

    def facts(
        self,
        source: Source,
        samples: Sequence[Sample],
        done: Callable[[int, int], None] = lambda done, count: None,
    ) -> list[ImageInfo]:
        """What is known of each sample; what is not known yet is read, on all cores.

        Args:
            source: Reads them.
            samples: N samples.
            done: Told now and then how many of how many samples are known.

        Returns:
            N facts.
        """
        return self._with_file(lambda path: _known(path, source, samples, done))

    def digests(self, source: Source, samples: Sequence[Sample]) -> np.ndarray:
        """SHA-256 of each sample's bytes; a file that is unchanged since it was read is not read again.

        Args:
            source: Reads them.
            samples: N samples.

        Returns:
            uint8 ``(N, 32)``.

        Raises:
            DataError: A file cannot be read.
        """
        return self._with_file(lambda path: _digests(path, source, samples))

    def _with_file(self, work: Callable[[str], T]) -> T:
        try:
            return work(str(self._path or MEMORY))
        except sqlite3.OperationalError:  # read-only, full, or locked for too long
            return work(MEMORY)
        except sqlite3.DatabaseError:  # damaged: it is made anew
            assert self._path is not None
            self._path.unlink(missing_ok=True)
            return work(str(self._path))


MEMORY = ":memory:"


def _digests(path: str, source: Source, samples: Sequence[Sample]) -> np.ndarray:
    decoder = f"{VERSION} {decoder_name(source)}".encode()
    found = np.zeros((len(samples), 32), np.uint8)
    with contextlib.closing(_prepared(path)) as database, ThreadPoolExecutor(cores()) as pool:

        def put(at: int, digest: bytes) -> None:
            found[at] = np.frombuffer(digest, np.uint8)

        lacking: list[tuple[int, File | None]] = []

        def read_all() -> None:
            read = pool.map(lambda at: hashlib.sha256(source.content(samples[at])).digest(), [at for at, _ in lacking])
            rows = []
            for (at, file), digest in zip(lacking, read, strict=True):
                put(at, digest)
                rows += [(*file, decoder, digest)] if file else []
            _save(database, [], rows)
            lacking.clear()

        for at, sample in enumerate(samples):
            digest = source.digest(sample)
            file = None if digest else _file(source, sample)
            if file is not None:
                (digest,) = database.execute(BY_STAMP, file).fetchone() or (None,)
            if digest:
                put(at, digest)
                continue
            lacking.append((at, file))
            if len(lacking) == CHUNK:  # a pool holds all that it is given at once
                read_all()
        read_all()
    return found


def _known(path: str, source: Source, samples: Sequence[Sample], done: Callable[[int, int], None]) -> list[ImageInfo]:
    decoder = f"{VERSION} {decoder_name(source)}".encode()  # sources that share it share what is known
    files = [_file(source, sample) for sample in samples]
    known: dict[int, ImageInfo] = {}
    saves = True
    with contextlib.closing(_prepared(path)) as database:
        for at, file in enumerate(files):
            row = file and database.execute(BY_FILE, (*file, decoder)).fetchone()
            if row:
                known[at] = _from(row)
        lock = threading.Lock()

        def kept(digest: bytes) -> ImageInfo | None:
            with lock:
                row = database.execute(BY_CONTENT, (digest, decoder)).fetchone()
            return _from(row) if row else None

        lacking = [at for at in range(len(samples)) if at not in known]
        done(len(known), len(samples))
        with ThreadPoolExecutor(cores()) as pool:
            for begin in range(0, len(lacking), CHUNK):  # a pool holds all that it is given at once
                part = lacking[begin : begin + CHUNK]
                known.update(zip(part, pool.map(lambda at: examine(source, samples[at], kept), part), strict=True))
                saves = saves and _keep(database, [(files[at], decoder, known[at]) for at in part])
                done(len(known), len(samples))
    return [known[at] for at in range(len(samples))]


File = tuple[bytes, str]  # a path, and the file's stamp
CHUNK = 256  # images between two writes
COLUMNS = "digest, error, kind, width, height, traits, phash, thumbnail, colour"
BY_FILE = (
    f"SELECT {COLUMNS} FROM images JOIN files USING (digest, decoder) WHERE path = ? AND stamp = ? AND decoder = ?"
)
BY_STAMP = "SELECT digest FROM files WHERE path = ? AND stamp = ?"
BY_CONTENT = f"SELECT {COLUMNS} FROM images WHERE digest = ? AND decoder = ?"


def _prepared(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5, check_same_thread=False)  # a lock has one thread at a time use it
    try:
        database.execute(f"CREATE TABLE IF NOT EXISTS images (decoder, {COLUMNS}, PRIMARY KEY (digest, decoder))")
        database.execute("CREATE TABLE IF NOT EXISTS files (path, stamp, decoder, digest, PRIMARY KEY (path, decoder))")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _from(row: Sequence[Any]) -> ImageInfo:
    digest, error, kind, width, height, found, phash, *looks = row
    return ImageInfo(
        digest, error, kind, width, height, tuple(found.split(";") if found else ()), int.from_bytes(phash), *looks
    )


def _keep(database: sqlite3.Connection, found: Sequence[tuple[File | None, bytes, ImageInfo]]) -> bool:
    """Keep facts; says whether that can be done."""
    images = [
        (decoder, *facts[:5], ";".join(facts.traits), facts.phash.to_bytes(8), facts.thumbnail, facts.colour)
        for _, decoder, facts in found
        if facts.digest
    ]
    return _save(
        database, images, [(*file, decoder, facts.digest) for file, decoder, facts in found if file and facts.digest]
    )


def _save(database: sqlite3.Connection, images: Sequence[Sequence[Any]], files: Sequence[Sequence[Any]]) -> bool:
    try:
        with database:
            database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", images)
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", files)
    except (
        sqlite3.OperationalError
    ):  # read-only, full or busy: everything is known all the same, and read again next time
        return False
    return True


def _file(source: Source, sample: Sample) -> File | None:
    stamp = source.stamp(sample)
    return None if stamp is None else (os.fsencode(os.path.realpath(sample.name)), stamp)
