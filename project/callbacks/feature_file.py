"""A safetensors file of features that is written in parts, in constant memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

ALIGNMENT = 8  # bytes to which safetensors pads its header
DTYPE = np.dtype("<f4")


def write_part(path: Path, features: np.ndarray) -> None:
    """Write features ``(N, D)`` as float32, without a header."""
    path.write_bytes(np.ascontiguousarray(features, DTYPE).tobytes())


def merge_parts(parts: Iterable[Path], path: Path, count: int, width: int, metadata: Mapping[str, str]) -> None:
    """Merge parts to a safetensors file with the tensor ``features``, float32 ``(N, D)``.

    The library writes only tensors that are in memory, so this function writes the header: its length as eight bytes,
    JSON, and spaces. Readers find the tensor by it.

    Args:
        parts: Files written by :func:`write_part`, in order.
        path: The file to write.
        count: N.
        width: D.
        metadata: Metadata of the file.
    """
    size = count * width * DTYPE.itemsize
    header = {"__metadata__": dict(metadata)} | {
        "features": {"dtype": "F32", "shape": [count, width], "data_offsets": [0, size]}
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, file)
        if file.tell() - begin != size:
            raise OSError(None, f"{file.tell() - begin} bytes of features were written, not {size}")
