"""Image index: properties of images, computed once per image and stored by content hash."""

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
SIDE = 16  # of the thumbnail, in pixels
DARK = 256 // 16  # grey value that 12-bit pixels in a 16-bit range do not reach
FILE = "images-3.sqlite"  # increase the number when the columns change
VERSION = f"4 pillow {PIL.__version__}"  # part of each key, because other Pillow versions may decode other files
File = tuple[bytes, str]  # path and stamp of a file
CHUNK = 256  # images between two writes
MEMORY = ":memory:"  # path of a temporary index
COLUMNS = "digest, error, kind, width, height, traits, phash, thumbnail, colour"
INFO_BY_FILE = (
    f"SELECT {COLUMNS} FROM images JOIN files USING (digest, decoder) WHERE path = ? AND stamp = ? AND decoder = ?"
)
DIGEST_BY_FILE = "SELECT digest FROM files WHERE path = ? AND stamp = ?"
INFO_BY_CONTENT = f"SELECT {COLUMNS} FROM images WHERE digest = ? AND decoder = ?"


class ImageInfo(NamedTuple):
    """Properties of an image.

    Attributes:
        digest: SHA-256 of the encoded bytes; empty if they cannot be read.
        error: Why the image cannot be decoded, without its name; empty if it can.
        kind: The kind of error, one to three words.
        width: Width as stored, in pixels.
        height: Height as stored, in pixels.
        traits: Properties that decoding handles, see :func:`project.data.image_io.traits`, and "nearly black" for a
            16-bit image that is dark throughout.
        phash: Perceptual hash, 64 bits; 0 if the image cannot be decoded.
        thumbnail: ``SIDE * SIDE`` grey values, uint8.
        color: Mean red, green and blue, uint8.
    """

    digest: bytes
    error: str = ""
    kind: str = ""
    width: int = 0
    height: int = 0
    traits: tuple[str, ...] = ()
    phash: int = 0
    thumbnail: bytes = b""
    color: bytes = b""


def examine(
    source: Source, sample: Sample, lookup: Callable[[bytes], ImageInfo | None] = lambda digest: None
) -> ImageInfo:
    """Read and decode an image, unless its content is indexed.

    Args:
        source: The source that reads the image.
        sample: The sample of the image.
        lookup: Returns the indexed properties of content with this SHA-256.
    """
    digest = source.digest(sample)
    indexed = lookup(digest) if digest else None
    if indexed is not None:
        return indexed
    try:
        content = source.content(sample)
    except DataError as error:
        return ImageInfo(b"", _reason(error, sample), "unreadable")
    digest = hashlib.sha256(content).digest()
    indexed = lookup(digest)
    if indexed is not None:
        return indexed
    width = height = 0
    properties: tuple[str, ...] = ()
    kind = "not an image"
    try:
        with contextlib.suppress(Exception), open_image(content) as header:
            kind = "damaged"
            width, height = header.size
            properties = tuple(traits(header))
        image = source.decode(content, sample, min_size=4 * SIDE)
    except DataError as error:
        if not content:
            kind = "empty"
        elif isinstance(error.__cause__, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            kind = "too large"
        elif "truncated" in str(error.__cause__):  # Pillow's word
            kind = "truncated"
        return ImageInfo(digest, _reason(error, sample), kind, width, height, properties)
    if not width:  # the source has its own decoder
        width, height = image.size
    phash, thumbnail, color = appearance(image)
    if "16-bit" in properties and max(thumbnail) < DARK:
        properties += ("nearly black",)
    return ImageInfo(digest, "", "", width, height, properties, phash, thumbnail, color)


def _reason(error: DataError, sample: Sample) -> str:
    """The message of an error without the name of its sample."""
    return f"{error.reason} {error.hint}".strip() if error.path == sample.name else str(error)


#: The first 8 rows of the matrix of a discrete cosine transform of size 32.
COSINES = np.cos(np.pi * (2 * np.arange(32) + 1) * np.arange(8)[:, None] / 64).astype(np.float32)


def appearance(image: Image.Image) -> tuple[int, bytes, bytes]:
    """Perceptual hash, grey thumbnail and mean color of an image.

    The perceptual hash is that of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010):
    one bit for each of the 64 lowest frequencies of the grey image at 32 x 32 pixels, set if it is above their median.

    Args:
        image: An RGB image.
    """
    tiny = image.resize((32, 32), Image.Resampling.BOX)
    small = tiny.convert("L")
    frequencies = (COSINES @ np.asarray(small, np.float32) @ COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), small.reduce(2).tobytes(), tiny.reduce(32).tobytes()


class Index:
    """A persistent index of image properties, shared by all data sets of this user.

    Properties are stored by content hash, and the content hash of a file by its path, size, times and inode, so an
    unchanged file is not read again. If the index cannot be opened or written, the images are read instead.

    Args:
        folder: Folder of the index; ``None`` keeps it in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None
        if folder is not None:
            with contextlib.suppress(OSError):  # _with_file handles an index that cannot be opened
                folder.mkdir(parents=True, exist_ok=True)

    def infos(
        self,
        source: Source,
        samples: Sequence[Sample],
        on_progress: Callable[[int, int], None] = lambda done, count: None,
    ) -> list[ImageInfo]:
        """Properties of each image. Images that are not indexed are read on all cores.

        Args:
            source: The source that reads the images.
            samples: N samples.
            on_progress: Called with the number of finished samples and N.

        Returns:
            N properties.
        """
        return self._with_file(lambda path: _infos(path, source, samples, on_progress))

    def digests(self, source: Source, samples: Sequence[Sample]) -> np.ndarray:
        """SHA-256 of each sample's encoded bytes. An unchanged file is not read again.

        Args:
            source: The source that reads the images.
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
        except sqlite3.DatabaseError:  # damaged: replaced by a new index
            assert self._path is not None
            self._path.unlink(missing_ok=True)
            return work(str(self._path))


def _digests(path: str, source: Source, samples: Sequence[Sample]) -> np.ndarray:
    decoder = f"{VERSION} {decoder_name(source)}".encode()
    digests = np.zeros((len(samples), 32), np.uint8)
    with contextlib.closing(_prepared(path)) as database, ThreadPoolExecutor(cores()) as pool:
        missing: list[tuple[int, File | None]] = []

        def read_missing() -> None:
            read = pool.map(lambda i: hashlib.sha256(source.content(samples[i])).digest(), [i for i, _ in missing])
            rows = []
            for (i, file), digest in zip(missing, read, strict=True):
                digests[i] = np.frombuffer(digest, np.uint8)
                rows += [(*file, decoder, digest)] if file else []
            _save(database, [], rows)
            missing.clear()

        for i, sample in enumerate(samples):
            digest = source.digest(sample)
            file = None if digest else _file(source, sample)
            if file is not None:
                (digest,) = database.execute(DIGEST_BY_FILE, file).fetchone() or (None,)
            if digest:
                digests[i] = np.frombuffer(digest, np.uint8)
                continue
            missing.append((i, file))
            if len(missing) == CHUNK:  # bounds memory: a pool keeps all results of one map
                read_missing()
        read_missing()
    return digests


def _infos(
    path: str, source: Source, samples: Sequence[Sample], on_progress: Callable[[int, int], None]
) -> list[ImageInfo]:
    decoder = f"{VERSION} {decoder_name(source)}".encode()  # sources with the same decoder share properties
    files = [_file(source, sample) for sample in samples]
    infos: dict[int, ImageInfo] = {}
    writable = True
    with contextlib.closing(_prepared(path)) as database:
        for i, file in enumerate(files):
            row = file and database.execute(INFO_BY_FILE, (*file, decoder)).fetchone()
            if row:
                infos[i] = _from_row(row)
        lock = threading.Lock()

        def lookup(digest: bytes) -> ImageInfo | None:
            with lock:
                row = database.execute(INFO_BY_CONTENT, (digest, decoder)).fetchone()
            return _from_row(row) if row else None

        missing = [i for i in range(len(samples)) if i not in infos]
        on_progress(len(infos), len(samples))
        with ThreadPoolExecutor(cores()) as pool:
            for begin in range(0, len(missing), CHUNK):  # bounds memory: a pool keeps all results of one map
                part = missing[begin : begin + CHUNK]
                infos.update(zip(part, pool.map(lambda i: examine(source, samples[i], lookup), part), strict=True))
                writable = writable and _save_infos(database, [(files[i], decoder, infos[i]) for i in part])
                on_progress(len(infos), len(samples))
    return [infos[i] for i in range(len(samples))]


def _prepared(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5, check_same_thread=False)  # callers hold a lock
    try:
        database.execute(f"CREATE TABLE IF NOT EXISTS images (decoder, {COLUMNS}, PRIMARY KEY (digest, decoder))")
        database.execute("CREATE TABLE IF NOT EXISTS files (path, stamp, decoder, digest, PRIMARY KEY (path, decoder))")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _from_row(row: Sequence[Any]) -> ImageInfo:
    digest, error, kind, width, height, properties, phash, *appearance = row
    properties = tuple(properties.split(";") if properties else ())
    return ImageInfo(digest, error, kind, width, height, properties, int.from_bytes(phash), *appearance)


def _save_infos(database: sqlite3.Connection, images: Sequence[tuple[File | None, bytes, ImageInfo]]) -> bool:
    """Store properties of images; returns whether the index is writable."""
    rows = [
        (decoder, *info[:5], ";".join(info.traits), info.phash.to_bytes(8), info.thumbnail, info.color)
        for _, decoder, info in images
        if info.digest
    ]
    files = [(*file, decoder, info.digest) for file, decoder, info in images if file and info.digest]
    return _save(database, rows, files)


def _save(database: sqlite3.Connection, images: Sequence[Sequence[Any]], files: Sequence[Sequence[Any]]) -> bool:
    try:
        with database:
            database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", images)
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", files)
    except sqlite3.OperationalError:  # read-only, full or locked: the images are read again next time
        return False
    return True


def _file(source: Source, sample: Sample) -> File | None:
    stamp = source.stamp(sample)
    return None if stamp is None else (os.fsencode(os.path.realpath(sample.name)), stamp)
