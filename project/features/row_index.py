"""Where each row of a space is: a file of sorted keys that is mapped, so that a process reads what it looks up alone.

The file is a hint, never the truth: shards that it does not list are read beside it, those that it lists and that are
gone are passed over, and a file that is not what was written is ignored. So it may be removed at any time.

It holds, in this order: the length of a header, 8 bytes; the header, JSON; four arrays as long as the rows are many,
which are the two halves of each key, sorted, the number of its shard, and its row there; and the SHA-256 of it all.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project.runtime.atomic_write import replacing

Keys = np.ndarray
"""Keys of rows, uint64 ``(N, 2)``: 128 bits each."""

FILE = "index.bin"
FORMAT = 1
CHUNK = 1 << 18  # rows, or keys, at a time
COLUMNS = (np.dtype("<u8"), np.dtype("<u8"), np.dtype("<i4"), np.dtype("<i4"))

_sound: dict[Path, tuple[int, int, int]] = {}
"""Index files whose checksum this process has verified, with what tells them from later ones."""


@dataclass(frozen=True)
class RowIndex:
    """An index that is open.

    Attributes:
        shards: What there is to know of each shard, in plain types, by its name; numbers of shards are places in it.
        columns: High and low half of each key, uint64 ``(N,)``, sorted; number of the shard and row in it, int32
            ``(N,)``.
    """

    shards: Mapping[str, Any]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns[0])

    def look_up(self, keys: Keys, order: np.ndarray, usable: np.ndarray, take: Callable[..., None]) -> None:
        """Find keys, some at a time.

        Args:
            keys: uint64 ``(N, 2)``.
            order: What sorts them by their first halves.
            usable: Which shards count, bool.
            take: Called with indices of keys, the shards' numbers, and the rows there.
        """
        high, low, shard, row = self.columns
        for begin in range(0, len(order) if len(self) else 0, CHUNK):
            asked = order[begin : begin + CHUNK]
            wanted = keys[asked]
            at = np.searchsorted(high, wanted[:, 0])
            while len(asked):  # once, but for keys with equal halves and rows that are stored twice
                inside = at < len(self)
                asked, wanted, at = asked[inside], wanted[inside], at[inside]
                same = high[at] == wanted[:, 0]
                asked, wanted, at = asked[same], wanted[same], at[same]
                number = shard[at]
                here = (low[at] == wanted[:, 1]) & usable[number]
                take(asked[here], number[here], row[at[here]])
                asked, wanted, at = asked[~here], wanted[~here], at[~here] + 1


def read_index(path: Path) -> RowIndex | None:
    """Open an index; ``None`` where there is none, or another version's, or one that is damaged."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if _sound.get(path) != stamp and not _is_sound(file, status.st_size):
                return None
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: no JSON, or empty
        return None
    if header.get("format") != FORMAT:
        return None
    _sound[path] = stamp
    columns, offset = [], 8 + length
    for dtype in COLUMNS:
        columns.append(np.frombuffer(mapped, dtype, header["rows"], offset))
        offset += header["rows"] * dtype.itemsize
    return RowIndex(header["shards"], tuple(columns))  # type: ignore[arg-type]


def _is_sound(file: Any, size: int) -> bool:
    whole, left = hashlib.sha256(), size - 32
    while left > 0:
        part = file.read(min(left, 1 << 20))
        if not part:
            return False
        whole.update(part)
        left -= len(part)
    return bool(file.read() == whole.digest())


def write_index(path: Path, index: RowIndex | None, shards: Mapping[str, tuple[Any, Keys]], gone: set[str]) -> None:
    """Write an index anew: what there is of the old one, and more shards. It is merged in parts, never held whole.

    Args:
        path: The file.
        index: The old one.
        shards: Those that are added: what there is to know of each, in plain types, and the keys of its rows.
        gone: Names of shards of the old one that are left out.

    Raises:
        OSError: It cannot be written.
    """
    old = {name: about for name, about in (index.shards if index else {}).items() if name not in gone}
    everything = {**old, **{name: about for name, (about, _) in shards.items()}}
    numbers = {name: number for number, name in enumerate(everything)}
    renumber = np.array([numbers.get(name, -1) for name in (index.shards if index else {})], np.int32)
    added = _sorted(
        np.concatenate([np.empty((0, 2), np.uint64), *(keys for _, keys in shards.values())]),
        np.repeat([numbers[name] for name in shards], [len(keys) for _, keys in shards.values()]).astype(np.int32),
        np.concatenate([np.empty(0, np.int32), *(np.arange(len(keys), dtype=np.int32) for _, keys in shards.values())]),
    )
    count = len(added[0]) + sum(int((renumber[part[2]] >= 0).sum()) for part in _parts(index))
    header = json.dumps({"format": FORMAT, "rows": count, "shards": everything}).encode()
    header += b" " * (-len(header) % 8)
    starts = np.cumsum([8 + len(header), *(count * dtype.itemsize for dtype in COLUMNS)])
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for part in _merged(index, added, renumber):
                for number, column in enumerate(part):
                    file.seek(int(starts[number]))
                    file.write(column.astype(COLUMNS[number], copy=False).tobytes())
                    starts[number] += column.nbytes
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        with temporary.open("ab") as file:
            file.write(digest)


def _sorted(keys: Keys, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    return (keys[order, 0], keys[order, 1], *(other[order] for other in others))


def _parts(index: RowIndex | None) -> Iterator[Sequence[np.ndarray]]:
    """An index some rows at a time."""
    for begin in range(0, len(index) if index else 0, CHUNK):
        assert index is not None
        yield [column[begin : begin + CHUNK] for column in index.columns]


def _merged(
    index: RowIndex | None, added: Sequence[np.ndarray], renumber: np.ndarray
) -> Iterator[Sequence[np.ndarray]]:
    """The rows of an old index that still have a shard, and others, sorted together."""
    done = 0
    for high, low, shard, row in _parts(index):
        until = int(np.searchsorted(added[0], high[-1]))  # those equal to the last come with the next part
        here = [column[done:until] for column in added]
        done = until
        left = renumber[shard] >= 0
        keys = np.stack([np.concatenate([high[left], here[0]]), np.concatenate([low[left], here[1]])], 1)
        yield _sorted(keys, np.concatenate([renumber[shard[left]], here[2]]), np.concatenate([row[left], here[3]]))
    if done < len(added[0]):
        yield [column[done:] for column in added]
