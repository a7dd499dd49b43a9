"""Shards: immutable safetensors files of rows, named by the SHA-256 of their bytes."""

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

from project.features.row_index import FileSignature, Keys, file_signature

SUFFIX = ".safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_verified: dict[Path, FileSignature] = {}
"""Shards whose SHA-256 this process has verified."""


@dataclass(frozen=True)
class Shard:
    """Location and layout of the rows in a shard.

    Attributes:
        path: The file.
        offset: Position of the first row, in bytes.
        dtype: Data type of the rows.
        shape: Shape of one row.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @classmethod
    def from_metadata(cls, path: Path, metadata: Mapping[str, Any]) -> Shard:
        """Create a shard from the result of :meth:`metadata`."""
        return cls(path, metadata["offset"], DTYPES[metadata["dtype"]], tuple(metadata["shape"][1:]))

    def metadata(self, rows: int) -> dict[str, Any]:
        """Metadata of a shard of ``rows`` rows for the index: all that is needed to read a row."""
        return {"rows": rows, "offset": self.offset, "dtype": DTYPE_NAMES[self.dtype], "shape": [rows, *self.shape]}


def open_shard(path: Path) -> tuple[Shard, Keys] | None:
    """Read the header and keys of a shard; ``None`` if the file is corrupt and cannot be parsed."""
    try:
        with safe_open(path, "np") as file:  # "pt" opens it twice: RuntimeError if it was removed in between
            keys = file.get_tensor("keys").astype(np.uint64)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))["rows"]
        if len(keys) != header["shape"][0]:
            return None
        return Shard.from_metadata(path, {**header, "offset": 8 + length + header["data_offsets"][0]}), keys
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def verify_shard(path: Path) -> bool:
    """Whether the SHA-256 of a shard matches its name. If so, its modification time is set to now, for eviction."""
    try:
        valid = _verified.get(path) == file_signature(path.stat()) or file_sha256(path) == path.stem
    except FileNotFoundError:  # removed in the meantime: opening it reports that
        return True
    if valid:
        # Set with nanoseconds, so that any later write changes the signature.
        now = time.time_ns()
        with suppress(OSError):  # read-only folder: the time of use is not recorded
            os.utime(path, ns=(now, now))
            _verified[path] = file_signature(path.stat())
    return valid


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
