"""Rows on disk: immutable shards, each named by the SHA-256 of its bytes, and an index of their keys.

A *space* is a folder of rows that the same prefix made in the same way; what made them is its name, so a row that was
made otherwise cannot be found in it. A row's key says which image it is of, and how that was transformed. A shard's
name is the hash of what is in it, so a truncated or altered one is known by its name, and two builders that write at
the same time write different files.

:meth:`Space.find` reads the index and nothing else; :meth:`Space.verify` reads the shards that are used, once per
process; :meth:`Space.quarantine` puts damaged ones aside; :meth:`Space.compact` merges small ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from project.errors import StoreError
from project.features.row_index import FILE, Keys, read_index, write_index
from project.features.shard import SUFFIX, Shard, describe_shard, file_sha256, is_sound, open_shard, shard_of
from project.runtime.atomic_write import TEMPORARY, appearing, replacing
from project.runtime.system import cores

DAMAGED = ".damaged"
#: Bytes of a shard, about: a run that is killed loses at most as much.
SHARD = 64 * 2**20
UNLISTED = 16  # shards beside the index, from which on it is written anew


def row_key(content: bytes, view: str) -> bytes:
    """Key of a row: 16 bytes of a SHA-256.

    Args:
        content: SHA-256 of the bytes that the image is made from.
        view: The transform with its parameters and, where it is random, its seed.
    """
    return hashlib.sha256(content + view.encode()).digest()[:16]


def as_keys(keys: Sequence[bytes]) -> Keys:
    """Put keys of 16 bytes into an array."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class Found:
    """Where rows are.

    Attributes:
        shards: The shards that hold some of them.
        shard: Index of each row's shard, int32 ``(N,)``; -1 where there is none.
        index: Its place there, int32 ``(N,)``.
        unreadable: Files that cannot be opened as a shard.
    """

    shards: list[Shard]
    shard: np.ndarray
    index: np.ndarray
    unreadable: tuple[Path, ...] = ()

    @property
    def missing(self) -> np.ndarray:
        """Indices of the keys that have no row."""
        return np.flatnonzero(self.shard < 0)


class Space:
    """The rows that one prefix makes in one way.

    Args:
        root: Folder of all spaces.
        description: What makes the rows, in plain types. Its hash names the folder.
    """

    def __init__(self, root: Path, description: Mapping[str, Any]) -> None:
        text = json.dumps(description, sort_keys=True, indent=1)
        self.path = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._text = text

    def find(self, keys: Keys, without: Collection[Path] = ()) -> Found:
        """Look rows up: in the index, and in the keys of shards that it does not list. No row is read.

        Args:
            keys: Of the rows, each once.
            without: Shards that do not count.
        """
        order = np.argsort(keys[:, 0])
        shards: dict[Path, Shard] = {}
        number = {path: at for at, path in enumerate(self.shards()) if path not in without}
        shard = np.full(len(keys), -1, np.int32)
        row = np.zeros(len(keys), np.int32)
        index = read_index(self.path / FILE)
        listed = {self.path / name: about for name, about in index.shards.items()} if index else {}
        if index:
            here = np.array([number.get(path, -1) for path in listed], np.int32)

            def take(wanted: np.ndarray, at: np.ndarray, rows: np.ndarray) -> None:
                shard[wanted] = here[at]
                row[wanted] = rows

            index.look_up(keys, order, here >= 0, take)
            shards = {path: shard_of(path, about) for path, about in listed.items() if path in number}
        unreadable = []
        for path in number.keys() - listed.keys():
            try:
                opened = open_shard(path)
            except OSError:  # another user's, or removed just now: that is no damage
                continue
            if opened is None:
                unreadable.append(path)
                continue
            shards[path] = opened[0]
            wanted, rows = _match(keys, order, opened[1])
            new = shard[wanted] < 0
            shard[wanted[new]] = number[path]
            row[wanted[new]] = rows[new]
        used = np.unique(shard[shard >= 0])
        paths = {at: path for path, at in number.items()}
        renumber = np.full(len(number) + len(without) + 1, -1, np.int32)  # its last stands for none
        renumber[used] = np.arange(len(used))
        return Found([shards[paths[at]] for at in used.tolist()], renumber[shard], row, tuple(unreadable))

    def shards(self) -> list[Path]:
        """The files of rows."""
        return sorted(self.path.glob(f"*{SUFFIX}"))

    def verify(self, found: Found) -> list[Path]:
        """Read the shards that hold rows, as a stream, and compare their hashes with their names.

        Each is read once per process, unless it has changed since. Those that are sound count as used now.

        Args:
            found: The rows.

        Returns:
            The shards that are damaged.
        """
        with ThreadPoolExecutor(cores()) as pool:
            paths = [shard.path for shard in found.shards]
            sound = list(pool.map(is_sound, paths))
        return [*found.unreadable, *(path for path, whole in zip(paths, sound, strict=True) if not whole)]

    def quarantine(self, shards: Collection[Path]) -> None:
        """Put damaged shards aside, under another name; eviction removes them first.

        In a folder that cannot be written they stay where they are: see ``without`` of :meth:`find`.
        """
        for path in shards:
            with suppress(OSError):
                path.rename(path.with_suffix(DAMAGED))

    def refresh_index(self) -> None:
        """Write the index anew where it lacks many shards, or many of its rows."""
        path = self.path / FILE
        index = read_index(path)
        listed = index.shards if index else {}
        there = {shard.name: shard for shard in self.shards()}
        added: dict[str, tuple[Any, Keys]] = {}
        for name in there.keys() - listed.keys():
            with suppress(OSError):  # removed just now
                opened = open_shard(there[name])
                if opened is not None:
                    added[name] = (describe_shard(opened[0], len(opened[1])), opened[1])
        gone = {name for name in listed if name not in there}
        more = sum(len(keys) for _, keys in added.values())
        less = sum(listed[name]["rows"] for name in gone)
        if more and (len(added) >= UNLISTED or 8 * (more + less) >= len(index or ())):
            with suppress(OSError):  # of a folder that cannot be written, or is full: the shards' own keys are read
                write_index(path, index, added, gone)

    def compact(self, shards: Collection[Path], size: int) -> None:
        """Merge small shards, whose rows are verified before; nothing is removed before the merged ones are there.

        Args:
            shards: Which; only those of a builder that holds the space, as readers may have found others already.
            size: Bytes of a merged one, about.

        Raises:
            StoreError: The folder cannot be written, or its disk is full.
        """
        batch: list[Path] = []
        total = 0
        for path in sorted(shards):
            try:
                length = path.stat().st_size
            except FileNotFoundError:  # another fit has made room
                continue
            if 2 * length > size or not is_sound(path):  # large already; a damaged one is not given a sound name
                continue
            if total + length > size:
                self._merge(batch)
                batch, total = [], 0
            batch.append(path)
            total += length
        self._merge(batch)

    def _merge(self, shards: Sequence[Path]) -> None:
        if len(shards) < 2:
            return
        try:
            parts = [load_file(path) for path in shards]
        except FileNotFoundError:  # another fit has made room meanwhile: what is left stays as it is
            return
        keys = torch.cat([part["keys"] for part in parts]).numpy().view(np.uint64)
        _, first = np.unique(keys, axis=0, return_index=True)
        rows = torch.cat([part["rows"] for part in parts])
        first.sort()
        merged = self.write(keys[first], rows[torch.from_numpy(first)] if len(first) < len(keys) else rows)
        for path in shards:
            if path != merged:  # one of them may have had the rows of all others
                path.unlink(missing_ok=True)

    def write(self, keys: Keys, rows: torch.Tensor) -> Path:
        """Add rows, whole and on the disk when this returns, or not at all.

        Args:
            keys: uint64 ``(N, 2)``.
            rows: ``(N, ...)``.

        Returns:
            The shard.

        Raises:
            StoreError: The folder cannot be written, or its disk is full.
        """
        tensors = {"keys": torch.from_numpy(keys.view(np.int64)), "rows": rows}
        shard = self.path

        def name(written: Path) -> str:
            nonlocal shard
            shard = self.path / f"{file_sha256(written)}{SUFFIX}"
            return shard.name

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            about = self.path / "space.json"
            if not about.exists():
                with replacing(about) as temporary:
                    temporary.write_text(self._text)
            with appearing(self.path, name) as temporary:
                save_file(tensors, temporary)
            return shard
        except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
            raise unwritable(self.path, error) from error

    @contextmanager
    def building(self, wait: Any = lambda: None) -> Iterator[None]:
        """Hold the space for one builder: what another one is computing need not be computed twice.

        Args:
            wait: Called once, when another builder has to be waited for.

        Raises:
            StoreError: The folder cannot be written, or not be locked.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait()
                lock.acquire()
            for left in self.path.glob(f"{TEMPORARY}*"):  # of a builder that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            yield
        finally:
            lock.release()


def unwritable(path: Path, error: Exception) -> StoreError:
    """Say that the store's folder cannot be written."""
    why = getattr(error, "strerror", None) or str(error)
    return StoreError(
        f"Features cannot be written to {path}: {why}. Name another folder with --features.folder PATH, "
        "make room, or leave them off with --features.cache off. What is stored already is kept."
    )


def evict_shards(root: Path, budget: int, keep: Collection[Path]) -> int:
    """Remove the shards that were used least recently, until the rest fits.

    Args:
        root: Folder of all spaces.
        budget: Bytes that they may take.
        keep: The shards that are in use, which are not removed.

    Returns:
        Bytes that were freed.
    """
    files = []
    for path in root.glob(f"*/*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another process evicts as well
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    for path in root.glob(f"*/*{DAMAGED}"):
        with suppress(FileNotFoundError):
            files.append((0.0, path.stat().st_size, path))
    total, freed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total - freed <= budget:
            break
        if path in keep:
            continue
        path.unlink(missing_ok=True)
        freed += size  # its folder stays: somebody may be building in it
        if not any(path.parent.glob(f"*{SUFFIX}")):
            (path.parent / FILE).unlink(missing_ok=True)
    return freed


def _match(keys: Keys, order: np.ndarray, held: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Which of the keys a shard holds: their indices, and their places in it."""
    place = np.searchsorted(keys[order, 0], held[:, 0])
    rows = np.flatnonzero(place < len(keys))
    wanted = order[place[rows]]
    same = (keys[wanted] == held[rows]).all(1)
    wanted, rows = wanted[same], rows[same]
    _, first = np.unique(wanted, return_index=True)
    return wanted[first], rows[first]
