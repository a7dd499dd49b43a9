"""One file of rows: what it holds, and whether its bytes are those that its name promises."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from project.features.row_index import Keys

SUFFIX = ".safetensors"
DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPE.items()}

_verified: dict[Path, tuple[int, int, int]] = {}
"""Shards whose bytes this process has verified, with what tells them from later ones."""


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


def open_shard(path: Path) -> tuple[Shard, Keys] | None:
    """A shard and its keys; ``None`` where the file is damaged so far that it cannot be opened."""
    try:
        with safe_open(path, "pt") as file:
            keys = file.get_tensor("keys").numpy().astype(np.uint64)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))["rows"]
        if len(keys) != header["shape"][0]:
            return None
        about = {"offset": 8 + length + header["data_offsets"][0], "dtype": header["dtype"], "shape": header["shape"]}
        return shard_of(path, about), keys
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def shard_of(path: Path, about: Mapping[str, Any]) -> Shard:
    """The shard that :func:`describe_shard` has described."""
    return Shard(path, about["offset"], DTYPE[about["dtype"]], tuple(about["shape"][1:]))


def describe_shard(shard: Shard, rows: int) -> dict[str, Any]:
    """What an index has of a shard: all that is needed to read a row."""
    return {"rows": rows, "offset": shard.offset, "dtype": NAMES[shard.dtype], "shape": [rows, *shard.shape]}


def is_sound(path: Path) -> bool:
    """Whether a shard is what its name says. It counts as used now."""
    try:
        sound = _verified.get(path) == _stamp(path) or file_sha256(path) == path.stem
    except FileNotFoundError:  # removed meanwhile: whoever reads it says so
        return True
    if sound:
        # The time has nanoseconds of its own, so whatever is written to the file later changes it.
        now = time.time_ns()
        with suppress(OSError):  # a read-only folder keeps no account of what is used
            os.utime(path, ns=(now, now))
            _verified[path] = _stamp(path)
    return sound


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
