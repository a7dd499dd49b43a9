"""Files wherever fsspec finds them: on this machine, in an object store, behind a web server."""

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

WINDOW = 8 * 2**20  # bytes that are read ahead at a time
HELD = max(8, cores())  # windows: each thread may be in one of its own
GAP = 2**16  # bytes and an image's own size: most that lies between two images that follow one another
AT_ONCE = 32  # requests for what is expected
RECENT = 64  # reads that are remembered, so that those of several threads are still seen to be in order

#: What tells in fsspec's information on a file that it has changed, in the words of one store or another.
MARKS = frozenset(
    (
        *("mtime", "ino", "created", "updated", "lastmodified", "etag", "generation", "versionid"),
        *("checksum", "md5", "md5hash", "contentmd5", "digest"),
    )
)


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Put what a file system raises into words.

    Raises:
        DataError: There is no such file, it cannot be read, or what reads files of its kind is not installed.
    """
    try:
        yield
    except ProjectError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"data.source: there is no {url}.") from error
    except ImportError as error:
        raise DataError(f"data.source: {url} needs another package. {error}.") from error
    except Exception as error:  # each store's client has errors of its own
        raise DataError(f"data.source: {url} cannot be read: {str(error) or type(error).__name__}.") from error


def expand(patterns: str | Iterable[str]) -> list[str]:
    """The files that patterns name, in order.

    Args:
        patterns: Paths or URLs, such as ``train-{0000..0099}.tar`` or ``s3://bucket/train-*.tar``.

    Raises:
        ConfigError: The braces of one are not in pairs.
        DataError: Nothing matches one, or a folder cannot be listed.
    """
    from fsspec.core import get_fs_token_paths
    from fsspec.utils import get_protocol

    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for url in _without_braces(pattern):
            with reading(url):
                files, _, paths = get_fs_token_paths(url)
                if not paths:
                    raise DataError(f"data.source: nothing matches {url}.")
                chain, chained, last = url.rpartition("::")  # filecache::s3://bucket/a.tar keeps a local copy
                if get_protocol(last) == "file" and not chained:
                    urls += paths  # absolute: a worker may be elsewhere
                elif "*" in last:
                    urls += [f"{chain}{chained}{files.unstrip_protocol(path)}" for path in paths]
                else:
                    urls.append(url)
    return urls


def folder_name(patterns: str | Iterable[str]) -> str:
    """Name of the folder of the first file that patterns name; empty if it has none.

    It is taken from the pattern. Only a folder with a wildcard in its own name is looked up.

    Args:
        patterns: As :func:`expand` takes them.

    Raises:
        ConfigError: The braces of the first are not in pairs.
        DataError: A folder with a wildcard matches nothing, or cannot be listed.
    """
    from fsspec.core import has_magic
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.utils import get_protocol

    url = _without_braces(patterns if isinstance(patterns, str) else next(iter(patterns)))[0]
    if has_magic(url.rpartition("/")[0]):
        url = expand(url)[0]
    _, chained, last = url.rpartition("::")
    if get_protocol(last) == "file" and not chained:
        last = LocalFileSystem._strip_protocol(last)  # absolute: the pattern may name no folder
    return PurePosixPath(last).parent.name


def _without_braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"data.source: the braces of {pattern!r} are not in pairs.") from error


def located(url: str) -> tuple[Any, str]:
    """The file system that a file is on, and its path there."""
    return _located(url, os.getpid())


@functools.lru_cache(4096)
def _located(url: str, process: int) -> tuple[Any, str]:
    """The same for one process: clients of a store do not outlive a fork."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path


def stamp(url: str) -> str | None:
    """What changes whenever a file does; ``None`` where its store tells nothing but its size.

    Raises:
        DataError: There is no such file, or it cannot be asked for.
    """
    with reading(url):
        files, path = located(url)
        told = files.info(path)
    if told.get("type") == "directory":
        raise DataError(f"data.source: {url} is a folder, not a tar file. Name the files in it: {url}/*.tar")
    words = {name.lower().replace("-", "").replace("_", ""): value for name, value in told.items()}
    marks = [f"{name}={words[name]}" for name in sorted(MARKS & words.keys()) if words[name] is not None]
    return " ".join([f"size={told.get('size')}", *marks]) if marks else None


def fetch(url: str, begin: int, end: int) -> bytes:
    """The bytes of a file from ``begin`` to before ``end``; fewer where it ends sooner.

    Raises:
        DataError: Its store gives whole files only. Whatever else goes wrong is raised as the store's client has it.
    """
    files, path = located(url)
    content = bytes(files.cat_file(path, begin, end))
    if len(content) > end - begin:
        raise DataError(f"data.source: the server of {url} gives no parts of files. Copy the shards to one that does.")
    return content


ByteRange = tuple[str, int, int]
"""Bytes of a file: its URL, where they begin, and where they end."""


class RangeReader:
    """Parts of files, from stores where a request takes as long for one image as for many.

    What is asked for in order is read ahead, in large pieces. Where reads jump about, each is of what is asked for
    alone, and those that are expected are under way all at once. Local files are left to the page cache. Safe to call
    from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._recent: deque[tuple[str, int]] = deque(maxlen=RECENT)
        self._expected: dict[ByteRange, Future[bytes]] = {}

    def __reduce__(self) -> tuple[type[RangeReader], tuple[()]]:
        return RangeReader, ()  # in another process it begins with none

    def prefetch(self, parts: Iterable[ByteRange]) -> None:
        """Begin to read what is asked for next; what was expected before is forgotten."""
        pool = ThreadPoolExecutor(AT_ONCE)
        self._expected = {part: pool.submit(fetch, *part) for part in parts if not _is_local(part[0])}
        pool.shutdown(wait=False)

    def read(self, url: str, begin: int, end: int) -> bytes:
        """The bytes of a file from ``begin`` to before ``end``; fewer where it ends sooner.

        Raises:
            DataError: It cannot be read.
        """
        expected = self._expected.get((url, begin, end))
        with reading(url):
            if expected is not None:
                return expected.result()
            if _is_local(url):
                return fetch(url, begin, end)
            numbers = range(begin // WINDOW, -(-end // WINDOW))
            with self._lock:
                ordered = any(other == url and 0 <= begin - at <= GAP + end - begin for other, at in self._recent)
                ordered = ordered or all((url, number) in self._held for number in numbers)
                self._recent.append((url, end))
            if not ordered:
                return fetch(url, begin, end)
            whole = b"".join(self._window(url, number) for number in numbers)
            first = numbers.start * WINDOW
            return whole[begin - first : end - first]

    def _window(self, url: str, number: int) -> bytes:
        """One window, read by one thread while the others that need it wait."""
        key = url, number
        with self._lock:
            mine = key not in self._held
            future = self._held.setdefault(key, Future())
            self._held.move_to_end(key)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        if mine:
            try:
                future.set_result(fetch(url, number * WINDOW, (number + 1) * WINDOW))
            except BaseException as error:
                with self._lock:
                    self._held.pop(key, None)  # who asks again tries again
                future.set_exception(error)
        return future.result()


def _is_local(url: str) -> bool:
    protocol = located(url)[0].protocol
    return "file" in (protocol if isinstance(protocol, tuple) else (protocol,))
