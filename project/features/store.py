"""Feature store: rows on disk, in immutable shards named by the SHA-256 of their bytes, with an index of their keys.

A *space* is a folder for rows that are computed in the same way. Its name is a hash of the description of that
computation (weights, cut, engine, precision, versions), so rows computed in another way are never found in it. The key
of a row is a hash of the image and its transform. As shards are named by their content, corrupt shards are detected by
name, and concurrent builders never write the same file with different content.

:meth:`Space.find` reads only the index. :meth:`Space.find_intact` also verifies the shards in use, once per process.
:meth:`Space.compact` merges small shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from project.errors import StoreError
from project.features.row_index import INDEX_FILE, Keys, read_index, write_index
from project.features.shard import SUFFIX, Shard, file_sha256, open_shard, verify_shard
from project.runtime.atomic_write import TEMPORARY_PREFIX, atomic_write, atomic_write_as
from project.runtime.system import cores

QUARANTINE_SUFFIX = ".damaged"
#: Approximate size of a shard, which limits what a killed run loses.
SHARD_BYTES = 64 * 2**20
MAX_UNINDEXED = 16  # number of new shards that triggers a rewrite of the index


def row_key(digest: bytes, view: str) -> bytes:
    """Key of a row: the first 16 bytes of a SHA-256.

    Args:
        digest: SHA-256 of the image's bytes.
        view: Description of the decoder, the transform with its parameters, and the view.
    """
    return hashlib.sha256(digest + view.encode()).digest()[:16]


def as_keys(keys: Sequence[bytes]) -> Keys:
    """Convert keys of 16 bytes to an array, uint64 ``(N, 2)``."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class RowLocations:
    """Where rows are stored.

    Attributes:
        shards: Shards that hold at least one of the rows.
        shard: Index of each row's shard in ``shards``, int32 ``(N,)``; -1 if the row is missing.
        row: Position of each row in its shard, int32 ``(N,)``.
        unreadable: Files that cannot be parsed as shards.
    """

    shards: list[Shard]
    shard: np.ndarray
    row: np.ndarray
    unreadable: tuple[Path, ...] = ()

    @property
    def missing(self) -> np.ndarray:
        """Indices of the keys that have no row."""
        return np.flatnonzero(self.shard < 0)


class Space:
    """Rows that are computed in the same way, in one folder of the store.

    Args:
        root: Folder of the store.
        description: What determines the rows, in plain types. Its hash names the folder.
    """

    def __init__(self, root: Path, description: Mapping[str, Any]) -> None:
        text = json.dumps(description, sort_keys=True, indent=1)
        self.path = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._text = text

    def find(self, keys: Keys, exclude: Collection[Path] = ()) -> RowLocations:
        """Locate rows, using the index and the keys of unindexed shards. No row is read.

        Args:
            keys: Keys of the rows, without duplicates.
            exclude: Shards to ignore.
        """
        order = np.argsort(keys[:, 0])
        shards: dict[Path, Shard] = {}
        # A shard of another user that cannot be read is not corrupt: it stays.
        paths = [path for path in self.shards() if path not in exclude and os.access(path, os.R_OK)]
        numbers = {path: number for number, path in enumerate(paths)}
        shard = np.full(len(keys), -1, np.int32)
        row = np.zeros(len(keys), np.int32)
        index = read_index(self.path / INDEX_FILE)
        indexed = {self.path / name: metadata for name, metadata in index.shards.items()} if index else {}
        if index:
            numbers_of_indexed = np.array([numbers.get(path, -1) for path in indexed], np.int32)
            for indices, shard_numbers, rows in index.look_up(keys, order, numbers_of_indexed >= 0):
                shard[indices] = numbers_of_indexed[shard_numbers]
                row[indices] = rows
            shards = {path: Shard.from_metadata(path, indexed[path]) for path in indexed if path in numbers}
        unreadable = []
        for path in numbers.keys() - indexed.keys():
            try:
                opened = open_shard(path)
            except OSError:  # removed just now: not corrupt
                continue
            if opened is None:
                unreadable.append(path)
                continue
            shards[path], shard_keys = opened
            indices, rows = _match(keys, order, shard_keys)
            new = shard[indices] < 0
            shard[indices[new]] = numbers[path]
            row[indices[new]] = rows[new]
        used = np.unique(shard[shard >= 0])
        renumber = np.full(len(paths) + 1, -1, np.int32)  # the last element, at index -1, is for missing rows
        renumber[used] = np.arange(len(used))
        return RowLocations([shards[paths[number]] for number in used], renumber[shard], row, tuple(unreadable))

    def shards(self) -> list[Path]:
        """Paths of all shards."""
        return sorted(self.path.glob(f"*{SUFFIX}"))

    def verify(self, locations: RowLocations, verified: Collection[Path] = ()) -> list[Path]:
        """Compare the SHA-256 of the shards in use with their names; mark valid shards as recently used.

        Each shard is read once per process, unless it changes, or another process marks it.

        Args:
            locations: Where the rows in use are stored.
            verified: Shards that are neither verified nor marked.

        Returns:
            Paths of corrupt shards.
        """
        with ThreadPoolExecutor(cores()) as pool:
            paths = [shard.path for shard in locations.shards if shard.path not in verified]
            valid = list(pool.map(verify_shard, paths))
        return [*locations.unreadable, *(path for path, ok in zip(paths, valid, strict=True) if not ok)]

    def find_intact(self, keys: Keys, verified: Collection[Path] = ()) -> tuple[RowLocations, int]:
        """Locate rows in intact shards; rows of corrupt shards count as missing.

        Corrupt shards are quarantined: renamed, so that they are no longer used, and evicted before all others.

        Args:
            keys: Keys of the rows, without duplicates.
            verified: Shards that are not verified again.

        Returns:
            Where the rows are stored, and the number of corrupt shards.
        """
        corrupt: set[Path] = set()
        while True:
            locations = self.find(keys, corrupt)
            newly_corrupt = {*self.verify(locations, verified)}
            if not newly_corrupt:
                return locations, len(corrupt)
            corrupt |= newly_corrupt
            for path in newly_corrupt:
                with suppress(OSError):  # a read-only folder: excluding them is enough
                    path.rename(path.with_suffix(QUARANTINE_SUFFIX))

    def refresh_index(self) -> None:
        """Rewrite the index if many shards, or a large share of the rows, are not in it."""
        path = self.path / INDEX_FILE
        index = read_index(path)
        indexed = index.shards if index else {}
        present = {shard.name: shard for shard in self.shards()}
        added: dict[str, tuple[Any, Keys]] = {}
        for name in present.keys() - indexed.keys():
            with suppress(OSError):  # removed just now
                opened = open_shard(present[name])
                if opened is not None:
                    shard, keys = opened
                    added[name] = (shard.metadata(len(keys)), keys)
        removed = {name for name in indexed if name not in present}
        new_rows = sum(len(keys) for _, keys in added.values())
        removed_rows = sum(indexed[name]["rows"] for name in removed)
        if new_rows and (len(added) >= MAX_UNINDEXED or 8 * (new_rows + removed_rows) >= len(index or ())):
            with suppress(OSError):  # read-only or full: keys are read from the shards instead
                write_index(path, index, added, removed)

    def compact(self, shards: Collection[Path], size: int) -> None:
        """Merge small shards after verifying them; originals are removed once the merged shard is on disk.

        Args:
            shards: Shards to merge. Pass only shards written under :meth:`lock`, as readers may be using others.
            size: Approximate bytes of a merged shard.

        Raises:
            StoreError: The folder is not writable, or the disk is full.
        """
        batch: list[Path] = []
        total = 0
        for path in sorted(shards):
            try:
                length = path.stat().st_size
            except FileNotFoundError:  # evicted by another process
                continue
            if 2 * length > size or not verify_shard(path):  # never copy corrupt rows into a valid shard
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
            parts = [load(path.read_bytes()) for path in shards]
        except FileNotFoundError:  # evicted by another process: do not merge the others
            return
        keys = torch.cat([part["keys"] for part in parts]).numpy().view(np.uint64)
        _, first = np.unique(keys, axis=0, return_index=True)
        rows = torch.cat([part["rows"] for part in parts])
        first.sort()
        merged = self.write(keys[first], rows[torch.from_numpy(first)] if len(first) < len(keys) else rows)
        for path in shards:
            if path != merged:  # a shard that contains the rows of all others is the merged one
                path.unlink(missing_ok=True)

    def write(self, keys: Keys, rows: torch.Tensor) -> Path:
        """Write rows to a new shard, atomically and synced to disk.

        Args:
            keys: uint64 ``(N, 2)``.
            rows: ``(N, ...)``.

        Returns:
            Path of the shard.

        Raises:
            StoreError: The folder is not writable, or the disk is full.
        """
        tensors = {"keys": torch.from_numpy(keys.view(np.int64)), "rows": rows}
        name = ""

        def name_by_content(written: Path) -> str:
            nonlocal name
            name = f"{file_sha256(written)}{SUFFIX}"
            return name

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            description = self.path / "space.json"
            if not description.exists():
                with atomic_write(description) as temporary:
                    temporary.write_text(self._text)
            with atomic_write_as(self.path, name_by_content) as temporary:
                save_file(tensors, temporary)
            return self.path / name
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as SafetensorError
            raise unwritable_error(self.path, error) from error

    @contextmanager
    def lock(self, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Lock the space for one builder, so that no row is computed twice.

        Args:
            on_wait: Called once if another builder holds the lock.

        Raises:
            StoreError: The folder is not writable, or cannot be locked.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                on_wait()
                lock.acquire()
            for leftover in self.path.glob(f"{TEMPORARY_PREFIX}*"):  # of a killed builder
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable_error(self.path, error) from error
        try:
            yield
        finally:
            lock.release()


def unwritable_error(path: Path, error: Exception) -> StoreError:
    """The error for a store folder that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return StoreError(
        f"Features cannot be written to {path}: {reason}. Rows stored so far are kept.\n"
        "Free disk space, use another folder (--features.folder PATH), or disable caching (--features.cache off)."
    )


def evict_shards(root: Path, budget: int, keep: Collection[Path]) -> int:
    """Remove the least recently used shards until the rest fits into a budget; quarantined shards go first.

    Args:
        root: Folder of the store.
        budget: Bytes that all shards may take.
        keep: Shards in use, which are not removed.

    Returns:
        Number of bytes freed.
    """
    files = []
    for suffix in (SUFFIX, QUARANTINE_SUFFIX):
        for path in root.glob(f"*/*{suffix}"):
            with suppress(FileNotFoundError):  # another process evicts as well
                status = path.stat()
                files.append((status.st_mtime if suffix == SUFFIX else 0.0, status.st_size, path))
    total, freed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total - freed <= budget:
            break
        if path in keep:
            continue
        path.unlink(missing_ok=True)
        freed += size
        if not any(path.parent.glob(f"*{SUFFIX}")):  # keep the folder: another builder may be using it
            (path.parent / INDEX_FILE).unlink(missing_ok=True)
    return freed


def _match(keys: Keys, order: np.ndarray, shard_keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the keys that a shard holds, and their rows in it."""
    position = np.searchsorted(keys[order, 0], shard_keys[:, 0])
    rows = np.flatnonzero(position < len(keys))
    indices = order[position[rows]]
    same = (keys[indices] == shard_keys[rows]).all(1)
    indices, rows = indices[same], rows[same]
    _, first = np.unique(indices, return_index=True)
    return indices[first], rows[first]
