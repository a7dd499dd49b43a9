"""Rows on disk: immutable shards, each named by the SHA-256 of its bytes.

A *space* is a folder of rows that the same prefix made in the same way; what made them is its name, so a row that was
made otherwise cannot be found in it. A row's key says which image it is of, and how that was transformed. A shard's
name is the hash of what is in it, so a truncated or altered one is known by its name, and two builders that write at
the same time write different files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from project.errors import StoreError
from project.runtime.atomic_write import TEMPORARY, appearing, replacing

Keys = np.ndarray
"""Keys of rows, uint64 ``(N, 2)``: 128 bits each."""

SUFFIX = ".safetensors"
#: Bytes of a shard, about: a run that is killed loses at most as much.
SHARD = 64 * 2**20


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
class Shard:
    """A file of rows that is whole.

    Attributes:
        path: The file.
        offset: Where its rows begin, in bytes.
        dtype: Of its rows.
        shape: Of one row.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Found:
    """Where rows are.

    Attributes:
        shards: The shards that hold some of them.
        shard: Index of each row's shard, int32 ``(N,)``; -1 where there is none.
        index: Its place there, int64 ``(N,)``.
        damaged: How many shards were not what their names say; their rows are not found.
    """

    shards: list[Shard]
    shard: np.ndarray
    index: np.ndarray
    damaged: int

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

    def find(self, keys: Keys, verify: bool = True) -> Found:
        """Look rows up.

        Args:
            keys: Of the rows, each once.
            verify: Read each shard that is needed, to see that it is whole.
        """
        order = np.argsort(keys[:, 0])
        shards: list[Shard] = []
        shard = np.full(len(keys), -1, np.int32)
        index = np.zeros(len(keys), np.int64)
        damaged = 0
        for path in sorted(self.path.glob(f"*{SUFFIX}")):
            try:
                opened = _open(path)
            except OSError:  # another user's, or removed just now: that is no damage
                continue
            place, rows = _match(keys, order, opened[1]) if opened else (np.empty(0, np.int64),) * 2
            new = shard[place] < 0
            if opened and not new.any():
                continue
            if opened is None and not verify:
                continue  # the look that verifies removes it, and counts it
            if opened is None or (verify and _sha256(path) != path.stem):
                damaged += 1
                with suppress(OSError):  # it is not used, whether it can be removed or not
                    path.unlink()
                continue
            shard[place[new]] = len(shards)
            index[place[new]] = rows[new]
            shards.append(opened[0])
            with suppress(OSError):  # a read-only folder keeps no account of what is used
                os.utime(path)
        return Found(shards, shard, index, damaged)

    def write(self, keys: Keys, rows: torch.Tensor) -> None:
        """Add rows, whole and on the disk when this returns, or not at all.

        Args:
            keys: uint64 ``(N, 2)``.
            rows: ``(N, ...)``.

        Raises:
            StoreError: The folder cannot be written, or its disk is full.
        """
        tensors = {"keys": torch.from_numpy(keys.view(np.int64)), "rows": rows}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            about = self.path / "space.json"
            if not about.exists():
                with replacing(about) as temporary:
                    temporary.write_text(self._text)
            with appearing(self.path, lambda written: f"{_sha256(written)}{SUFFIX}") as temporary:
                save_file(tensors, temporary)
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


def evict(root: Path, budget: int, keep: Collection[Path]) -> int:
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
    total, freed = sum(size for _, size, _ in files), 0
    for _, size, path in sorted(files):
        if total - freed <= budget:
            break
        if path in keep:
            continue
        path.unlink(missing_ok=True)
        freed += size  # its folder stays: somebody may be building in it
    return freed


def _open(path: Path) -> tuple[Shard, Keys] | None:
    """A shard and its keys; ``None`` where the file is damaged so far that it cannot be opened."""
    try:
        with safe_open(path, "pt") as file:
            keys = file.get_tensor("keys").numpy().astype(np.uint64)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))["rows"]
        shape = tuple(header["shape"])
        if len(keys) != shape[0]:
            return None
        shard = Shard(path, 8 + length + header["data_offsets"][0], DTYPE[header["dtype"]], shape[1:])
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return shard, keys


DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _match(keys: Keys, order: np.ndarray, held: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Which of the keys a shard holds: their indices, and their places in it."""
    place = np.searchsorted(keys[order, 0], held[:, 0])
    rows = np.flatnonzero(place < len(keys))
    wanted = order[place[rows]]
    same = (keys[wanted] == held[rows]).all(1)
    wanted, rows = wanted[same], rows[same]
    _, first = np.unique(wanted, return_index=True)
    return wanted[first], rows[first]
