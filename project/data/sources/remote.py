"""Read files through fsspec: from local disks, object stores and web servers."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from project.errors import ConfigError, DataError, ProjectError
from project.runtime.system import cores

WINDOW_SIZE = 8 * 2**20  # bytes to read ahead at a time
MAX_WINDOWS = max(8, cores())  # windows in memory: each thread may read from another one
MAX_GAP = 2**16  # bytes, in addition to the size of the read, that a sequential read may skip
PREFETCH_THREADS = 32
RECENT_READS = 64  # reads to remember, so that interleaved reads of several threads still count as sequential

#: Entries of fsspec's file information that change with the file. Each store has its own.
CHANGE_KEYS = frozenset(
    (
        *("mtime", "ino", "created", "updated", "lastmodified", "etag", "generation", "versionid"),
        *("checksum", "md5", "md5hash", "contentmd5", "digest"),
    )
)


@contextmanager
def convert_errors(url: str) -> Iterator[None]:
    """Raise errors of a file system as :class:`DataError`.

    Raises:
        DataError: The file does not exist or cannot be read, or the client of its store is not installed.
    """
    try:
        yield
    except ProjectError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"data.source: {url} does not exist.") from error
    except ImportError as error:
        raise DataError(f"data.source: {url} needs another package. {error}.") from error
    except Exception as error:  # each store's client has its own types of errors
        raise DataError(f"data.source: {url} cannot be read: {str(error) or type(error).__name__}.") from error


def expand_urls(patterns: str | Iterable[str]) -> list[str]:
    """Expand patterns to the URLs of files, in order.

    Args:
        patterns: Paths or URLs with braces or wildcards, such as ``train-{0000..0099}.tar`` or
            ``s3://bucket/train-*.tar``.

    Raises:
        ConfigError: Braces do not match.
        DataError: A pattern matches no file, or a folder cannot be listed.
    """
    from fsspec.core import get_fs_token_paths
    from fsspec.utils import get_protocol

    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for url in _expand_braces(pattern):
            with convert_errors(url):
                files, _, paths = get_fs_token_paths(url)
                if not paths:
                    raise DataError(f"data.source: no file matches {url}.")
                prefix, separator, last = url.rpartition("::")  # a chain, such as filecache::s3://bucket/a.tar
                if get_protocol(last) == "file" and not separator:
                    urls += paths  # absolute, because a worker may have another working directory
                elif "*" in last:
                    urls += [f"{prefix}{separator}{files.unstrip_protocol(path)}" for path in paths]
                else:
                    urls.append(url)
    return urls


def folder_name(patterns: str | Iterable[str]) -> str:
    """Name of the folder of the first file; empty if it has none.

    It is taken from the pattern. The folder is listed only if its own name has a wildcard.

    Args:
        patterns: See :func:`expand_urls`.

    Raises:
        ConfigError: Braces do not match.
        DataError: A folder with a wildcard matches nothing, or cannot be listed.
    """
    from fsspec.core import has_magic
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.utils import get_protocol

    url = _expand_braces(patterns if isinstance(patterns, str) else next(iter(patterns)))[0]
    if has_magic(url.rpartition("/")[0]):
        url = expand_urls(url)[0]
    _, separator, last = url.rpartition("::")
    if get_protocol(last) == "file" and not separator:
        last = LocalFileSystem._strip_protocol(last)  # absolute, because the pattern may have no folder
    return PurePosixPath(last).parent.name


def _expand_braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"data.source: the braces of {pattern!r} do not match. Close each opening brace.") from error


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there."""
    return _open_filesystem(url, os.getpid())


@functools.lru_cache(4096)
def _open_filesystem(url: str, pid: int) -> tuple[Any, str]:
    """Cached per process, because the clients of stores do not survive a fork."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path


def stamp(url: str) -> str | None:
    """A value that changes whenever the file does; ``None`` if the store reports no more than its size.

    Raises:
        DataError: The file does not exist, is a folder, or its store cannot be reached.
    """
    with convert_errors(url):
        files, path = open_filesystem(url)
        info = files.info(path)
    if info.get("type") == "directory":
        raise DataError(f"data.source: {url} is a folder, not a tar file. Pass the files in it: {url}/*.tar")
    normalized = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    changes = [
        f"{key}={normalized[key]}" for key in sorted(CHANGE_KEYS & normalized.keys()) if normalized[key] is not None
    ]
    return " ".join([f"size={info.get('size')}", *changes]) if changes else None


def fetch(url: str, begin: int, end: int) -> bytes:
    """Read the bytes ``begin`` to ``end`` (exclusive) of a file; fewer if it ends before.

    Raises:
        DataError: The server ignores range requests. Errors of the store's client propagate unchanged.
    """
    files, path = open_filesystem(url)
    content = bytes(files.cat_file(path, begin, end))
    if len(content) > end - begin:
        raise DataError(
            f"data.source: the server of {url} does not support range requests. Copy the shards to one that does."
        )
    return content


ByteRange = tuple[str, int, int]
"""URL of a file, first byte, and end (exclusive)."""


class RangeReader:
    """Reads byte ranges of remote files, where one request takes as long for one image as for many.

    Sequential reads are served from large windows that are read ahead. Random reads fetch exactly the range; expected
    ones are prefetched concurrently. Local files are read directly. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._recent: deque[tuple[str, int]] = deque(maxlen=RECENT_READS)
        self._prefetched: dict[ByteRange, Future[bytes]] = {}

    def __reduce__(self) -> tuple[type[RangeReader], tuple[()]]:
        return RangeReader, ()  # another process starts with empty caches

    def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Start to read remote ranges in the background. Replaces those of the last call."""
        pool = ThreadPoolExecutor(PREFETCH_THREADS)
        self._prefetched = {part: pool.submit(fetch, *part) for part in ranges if not _is_local(part[0])}
        pool.shutdown(wait=False)

    def read(self, url: str, begin: int, end: int) -> bytes:
        """Read the bytes ``begin`` to ``end`` (exclusive) of a file; fewer if it ends before.

        Raises:
            DataError: The file cannot be read.
        """
        prefetched = self._prefetched.get((url, begin, end))
        with convert_errors(url):
            if prefetched is not None:
                return prefetched.result()
            if _is_local(url):
                return fetch(url, begin, end)
            numbers = range(begin // WINDOW_SIZE, -(-end // WINDOW_SIZE))
            with self._lock:
                is_sequential = any(
                    other == url and 0 <= begin - other_end <= MAX_GAP + end - begin
                    for other, other_end in self._recent
                )
                is_sequential = is_sequential or all((url, number) in self._windows for number in numbers)
                self._recent.append((url, end))
            if not is_sequential:
                return fetch(url, begin, end)
            content = b"".join(self._window(url, number) for number in numbers)
            offset = numbers.start * WINDOW_SIZE
            return content[begin - offset : end - offset]

    def _window(self, url: str, number: int) -> bytes:
        """Read a window. One thread fetches it; others that need it wait for the same future."""
        key = url, number
        with self._lock:
            fetches = key not in self._windows
            future = self._windows.setdefault(key, Future())
            self._windows.move_to_end(key)
            while len(self._windows) > MAX_WINDOWS:
                self._windows.popitem(last=False)
        if fetches:
            try:
                future.set_result(fetch(url, number * WINDOW_SIZE, (number + 1) * WINDOW_SIZE))
            except BaseException as error:
                with self._lock:
                    self._windows.pop(key, None)  # the next read tries again
                future.set_exception(error)
        return future.result()


def _is_local(url: str) -> bool:
    protocol = open_filesystem(url)[0].protocol
    return "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
