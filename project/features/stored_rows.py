"""Rows in the store, looked up by the content of images."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from project.data.prediction_loader import StoredPart
from project.errors import StoreError
from project.features.row_index import Keys
from project.features.row_loader import open_rows
from project.features.store import RowLocations, Space, as_keys, row_key


class StoredRows:
    """Finds images that have a row in each of some spaces. Nothing is written. Thread-safe.

    Args:
        spaces: A space for each frozen prefix, and the description of its views: see
            :func:`~project.features.views.view_description`.
    """

    def __init__(self, spaces: Sequence[tuple[Space, str]]) -> None:
        self._spaces = spaces

    @property
    def is_empty(self) -> bool:
        """Whether a space has no rows, so that nothing can be found."""
        return not all(space.shards() for space, _ in self._spaces)

    def __call__(self, contents: Sequence[bytes]) -> StoredPart:
        """Look up images.

        Args:
            contents: The bytes of each file.

        Returns:
            The positions of the images that are found, and their rows in each space.
        """
        digests = [hashlib.sha256(content).digest() for content in contents]
        keys = [as_keys([row_key(digest, description) for digest in digests]) for _, description in self._spaces]
        located = [
            space.find_intact(np.unique(part, axis=0))[0] for (space, _), part in zip(self._spaces, keys, strict=True)
        ]
        positions = reduce(np.intersect1d, (_found(part, where) for part, where in zip(keys, located, strict=True)))
        try:
            rows = [_read(space, part[positions]) for (space, _), part in zip(self._spaces, keys, strict=True)]
        except StoreError:  # evicted just now by another process: the rows are computed instead
            return StoredPart([], [])
        return StoredPart(positions.tolist(), rows) if len(positions) else StoredPart([], [])


def _found(keys: Keys, locations: RowLocations) -> np.ndarray:
    """Positions of the keys that have a row, given where their distinct values are."""
    _, inverse = np.unique(keys, axis=0, return_inverse=True)
    return np.flatnonzero(locations.shard[inverse.reshape(-1)] >= 0)


def _read(space: Space, keys: Keys) -> torch.Tensor:
    """Rows of keys that are stored, ``(N, ...)`` on the CPU."""
    distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
    if not len(distinct):
        return torch.empty(0)
    locations = space.find(distinct)
    if len(locations.missing):
        raise StoreError(f"Rows were removed from {space.path}.")
    rows = open_rows(space, distinct, locations, sys.maxsize, torch.device("cpu"))
    try:
        return rows[torch.from_numpy(inverse.reshape(-1).astype(np.int64))]
    finally:
        rows.close()
