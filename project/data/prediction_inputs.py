"""The images to predict: files, folders, glob patterns, tables, tar shards, and names from standard input."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

from project.data.image_io import SUFFIXES, list_images
from project.data.sources.base import Sample, Source
from project.data.sources.files import Files
from project.data.sources.manifest import TABLES, read_table
from project.errors import ConfigError, DataError
from project.runtime.console import print_rank_zero

STANDARD_INPUT = "-"
OPTION = "--images"
READ_BYTES = 1 << 20
SHOWN = 80  # characters of a name in an error


class PredictionImages(NamedTuple):
    """Images in the order of their predictions.

    Attributes:
        source: Reads the images.
        samples: N samples.
    """

    source: Source
    samples: Sequence[Sample]


class FileList(Sequence[Sample]):
    """Samples of image files in one block of memory: each takes the bytes of its path, and 8 more.

    Worker processes read it without copying its memory pages, as there are no reference counts in it.

    Args:
        names: Paths of the files.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self._text += os.fsencode(name)
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError
        return Sample(os.fsdecode(bytes(self._text[self._ends[number] : self._ends[number + 1]])), 0)


def find_images(inputs: Sequence[str]) -> PredictionImages:
    """Find the images to predict. An image that is named twice is predicted once.

    Args:
        inputs: Each is an image file; a folder, which is searched recursively; a glob pattern such as
            ``photos/**/*.jpg``; a table (CSV, TSV or Parquet) with a column ``path``; a tar file of images, local or at
            any URL that fsspec supports, or a pattern of such files; or ``-``, for file names on standard input, which
            are separated by newlines or by null bytes.

    Raises:
        ConfigError: Tar files are mixed with other inputs.
        DataError: An input does not exist, or there are no images.
    """
    shards = [name for name in inputs if _is_shard(name)]
    if shards and len(shards) < len(inputs):
        other = next(name for name in inputs if not _is_shard(name))
        raise ConfigError(f"{OPTION}: tar files cannot be mixed with others, such as {other}. Predict them separately.")
    if shards:
        return _images_of_shards(shards)
    repeated = 0

    def unique() -> Iterator[str]:
        nonlocal repeated
        seen: set[bytes] = set()
        for name in (name for item in inputs for name in _expand(item)):
            digest = hashlib.blake2b(os.fsencode(name), digest_size=16).digest()
            repeated += digest in seen
            if digest not in seen:
                seen.add(digest)
                yield name

    samples = FileList(unique())
    if not samples:
        raise DataError(f"{OPTION}: {', '.join(map(_quoted, inputs))} contains no images.")
    if repeated:
        print_rank_zero(f"Images: {repeated:,} names are repeated; each image is predicted once")
    return PredictionImages(Files(), samples)


def images_of_source(source: Source) -> PredictionImages:
    """All images of a source, in the order train, val, test.

    Raises:
        DataError: The source cannot be read, or has no images.
    """
    source.require()
    samples = [sample for split in ("train", "val", "test") for sample in source.splits.get(split, ())]
    return PredictionImages(source, samples)


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 of the names and their order."""
    digest = hashlib.sha256()
    for sample in samples:
        name = os.fsencode(sample.name)
        digest.update(len(name).to_bytes(8, "little") + name)
    return digest.hexdigest()


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") or "://" in name or "::" in name


def _images_of_shards(patterns: list[str]) -> PredictionImages:
    from project.data.sources.webdataset import Shards

    source = Shards(train=patterns, label="")
    source.prepare()
    for finding in source.findings:
        if finding.kind == "bad shard":
            raise DataError(finding.text)
    if not source.splits["train"]:
        raise DataError(f"{OPTION}: {', '.join(map(_quoted, patterns))} contains no images.")
    return PredictionImages(source, source.splits["train"])


def _expand(item: str) -> Iterator[str]:
    """Names of the image files of an input."""
    if item == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError(f"{OPTION}: standard input is closed. Send the names of the images to it.")
        yield from read_names(sys.stdin.buffer)
        return
    path = Path(item).expanduser()
    _require_accessible(path, item)
    if path.is_dir():
        yield from map(str, list_images(path).images)
    elif path.suffix.lower() in TABLES and path.is_file():
        yield from (str(path.parent / row["path"]) for _, row in read_table(path, ["path"], OPTION) if row["path"])
    elif path.is_file():
        yield str(path)
    elif glob.has_magic(item):
        yield from _expand_pattern(str(path))
    else:
        start = "" if path.is_absolute() else f"; names are relative to {Path.cwd()}"
        raise DataError(f"{OPTION}: {item} does not exist. Check the name{start}.")


def _require_accessible(path: Path, item: str) -> None:
    """Check that a name can be that of a file.

    Raises:
        DataError: The name is empty or too long, or its folder is closed.
    """
    if not item:
        raise DataError(f"{OPTION}: a name is empty. For the current folder: {OPTION} .")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # such as a pattern
            path.stat()
    except OSError as error:
        shown = item if len(item) <= SHOWN else f"{item[:SHOWN]}…"
        raise DataError(
            f"{OPTION}: {shown} cannot be read: {error.strerror}. Pass each name separately, or a list of names with "
            f"{OPTION} {STANDARD_INPUT}"
        ) from error


def _expand_pattern(pattern: str) -> Iterator[str]:
    """Names of the image files that match a pattern, and of those in the folders that match, sorted."""
    found = False
    for name in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        path = Path(name)
        names = map(str, list_images(path).images) if path.is_dir() else [name] if _is_image(path) else []
        for image in names:
            found = True
            yield image
    if not found:
        raise DataError(f"{OPTION}: no image matches {pattern}.")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def read_names(stream: BinaryIO) -> Iterator[str]:
    """Read file names that are separated by newlines, or by null bytes if there are any in the first megabyte.

    Args:
        stream: Names in the encoding of the file system.
    """
    rest = stream.read(READ_BYTES)
    separator = b"\0" if b"\0" in rest else b"\n"
    while True:
        *names, rest = rest.split(separator)
        yield from (os.fsdecode(name) for name in names if name)
        more = stream.read(READ_BYTES)
        if not more:
            break
        rest += more
    if rest:
        yield os.fsdecode(rest)


def _quoted(name: str) -> str:
    return "standard input" if name == STANDARD_INPUT else name
