"""Index of a space: a memory-mapped file of sorted row keys. A process reads only the parts that it looks up.

The index is a cache, never the source of truth. Shards that it does not list are read directly, listed shards that no
longer exist are skipped, and a corrupt index is ignored. It may be deleted at any time.

File format: length of the header (8 bytes, little-endian); header (JSON); four columns with one value per row, which
are the two halves of the sorted keys, the shard number, and the row in that shard; SHA-256 of all preceding bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project.runtime.atomic_write import atomic_write

Keys = np.ndarray
"""Row keys, uint64 ``(N, 2)``: 128 bits each."""

INDEX_FILE = "index.bin"
FORMAT = 1
CHUNK = 1 << 18  # rows, or keys, to process at a time
COLUMNS = (np.dtype("<u8"), np.dtype("<u8"), np.dtype("<i4"), np.dtype("<i4"))

FileSignature = tuple[int, int, int]
"""Inode, size and modification time of a file: differs once the file is replaced or written to."""

_verified: dict[Path, FileSignature] = {}
"""Index files whose checksum this process has verified."""


@dataclass(frozen=True)
class RowIndex:
    """An open index.

    Attributes:
        shards: Metadata of each shard by name, in plain types. A shard number is a position in this mapping.
        columns: High and low half of each key, uint64 ``(N,)``, sorted; shard number, int32 ``(N,)``; row in the
            shard, int32 ``(N,)``.
    """

    shards: Mapping[str, Any]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns[0])

    def look_up(self, keys: Keys, order: np.ndarray, usable: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Look up keys in chunks.

        Args:
            keys: uint64 ``(N, 2)``.
            order: Permutation that sorts the keys by their high halves.
            usable: Whether each shard may be used, bool.

        Yields:
            Indices into ``keys``, the shard number of each, and the row in that shard.
        """
        high, low, shard, row = self.columns
        for begin in range(0, len(order) if len(self) else 0, CHUNK):
            indices = order[begin : begin + CHUNK]
            wanted = keys[indices]
            position = np.searchsorted(high, wanted[:, 0])
            while len(indices):  # one pass, unless high halves collide or a row is stored twice
                inside = position < len(self)
                indices, wanted, position = indices[inside], wanted[inside], position[inside]
                same = high[position] == wanted[:, 0]
                indices, wanted, position = indices[same], wanted[same], position[same]
                number = shard[position]
                match = (low[position] == wanted[:, 1]) & usable[number]
                yield indices[match], number[match], row[position[match]]
                indices, wanted, position = indices[~match], wanted[~match], position[~match] + 1


def file_signature(status: os.stat_result) -> FileSignature:
    """Signature of a file, to detect that it has changed."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_index(path: Path) -> RowIndex | None:
    """Open an index; ``None`` if it is missing, corrupt or of another format version."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            signature = file_signature(status)
            if _verified.get(path) != signature and not _checksum_matches(file, status.st_size):
                return None
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: invalid JSON, or an empty file
        return None
    if header.get("format") != FORMAT:
        return None
    _verified[path] = signature
    columns, offset = [], 8 + length
    for dtype in COLUMNS:
        columns.append(np.frombuffer(mapped, dtype, header["rows"], offset))
        offset += header["rows"] * dtype.itemsize
    return RowIndex(header["shards"], tuple(columns))  # type: ignore[arg-type]


def _checksum_matches(file: Any, size: int) -> bool:
    digest, remaining = hashlib.sha256(), size - 32
    while remaining > 0:
        part = file.read(min(remaining, 1 << 20))
        if not part:
            return False
        digest.update(part)
        remaining -= len(part)
    return bool(file.read() == digest.digest())


def write_index(path: Path, index: RowIndex | None, shards: Mapping[str, tuple[Any, Keys]], removed: set[str]) -> None:
    """Merge an index with new shards and write the result; rows are merged in chunks to bound memory.

    Args:
        path: File to write atomically.
        index: The current index.
        shards: New shards by name: metadata in plain types, and the keys of the rows.
        removed: Names of shards to drop from the current index.

    Raises:
        OSError: The file cannot be written.
    """
    current = index.shards if index else {}
    merged = {name: metadata for name, metadata in current.items() if name not in removed}
    merged |= {name: metadata for name, (metadata, _) in shards.items()}
    numbers = {name: number for number, name in enumerate(merged)}
    renumber = np.array([numbers.get(name, -1) for name in current], np.int32)
    added = _sorted(
        np.concatenate([np.empty((0, 2), np.uint64), *(keys for _, keys in shards.values())]),
        np.repeat([numbers[name] for name in shards], [len(keys) for _, keys in shards.values()]).astype(np.int32),
        np.concatenate([np.empty(0, np.int32), *(np.arange(len(keys), dtype=np.int32) for _, keys in shards.values())]),
    )
    count = len(added[0]) + sum(int((renumber[chunk[2]] >= 0).sum()) for chunk in _chunks(index))
    header = json.dumps({"format": FORMAT, "rows": count, "shards": merged}).encode()
    header += b" " * (-len(header) % 8)
    offsets = np.cumsum([8 + len(header), *(count * dtype.itemsize for dtype in COLUMNS)])
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for chunk in _merged_chunks(index, added, renumber):
                for number, column in enumerate(chunk):
                    file.seek(int(offsets[number]))
                    file.write(column.astype(COLUMNS[number], copy=False).tobytes())
                    offsets[number] += column.nbytes
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        with temporary.open("ab") as file:
            file.write(digest)


def _sorted(keys: Keys, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    return (keys[order, 0], keys[order, 1], *(other[order] for other in others))


def _chunks(index: RowIndex | None) -> Iterator[Sequence[np.ndarray]]:
    """The columns of an index, ``CHUNK`` rows at a time."""
    for begin in range(0, len(index) if index else 0, CHUNK):
        assert index is not None
        yield [column[begin : begin + CHUNK] for column in index.columns]


def _merged_chunks(
    index: RowIndex | None, added: Sequence[np.ndarray], renumber: np.ndarray
) -> Iterator[Sequence[np.ndarray]]:
    """Sorted columns of the rows added and of the indexed rows whose shards remain, in chunks."""
    done = 0
    for high, low, shard, row in _chunks(index):
        until = int(np.searchsorted(added[0], high[-1]))  # keys equal to the last one go into the next chunk
        new = [column[done:until] for column in added]
        done = until
        kept = renumber[shard] >= 0
        keys = np.stack([np.concatenate([high[kept], new[0]]), np.concatenate([low[kept], new[1]])], 1)
        yield _sorted(keys, np.concatenate([renumber[shard[kept]], new[2]]), np.concatenate([row[kept], new[3]]))
    if done < len(added[0]):
        yield [column[done:] for column in added]
