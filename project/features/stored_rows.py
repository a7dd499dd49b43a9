"""Rows in the store, looked up by the content of images."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from project.data.prediction_loader import StoredPart
from project.errors import StoreError
from project.features.row_loader import open_rows
from project.features.store import RowLocations, Space, as_keys, row_key


class StoredRows:
    """Finds images that have a row in each of some spaces. No row is written. Thread-safe.

    Args:
        spaces: A space for each frozen prefix, and the description of its views: see
            :func:`~project.features.views.view_description`.
    """

    def __init__(self, spaces: Sequence[tuple[Space, str]]) -> None:
        self._spaces = spaces
        # Verified once: each verification marks a shard, and other processes would read the marked shard again.
        self._verified: set[Path] = set()

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
        try:
            located = [_Located(space, description, digests, self._verified) for space, description in self._spaces]
            self._verified.update(path for part in located for path in part.shards)
            positions = np.flatnonzero(np.all([part.is_stored for part in located], axis=0))
            if len(positions):
                return StoredPart(positions.tolist(), [part.read(positions) for part in located])
        except (StoreError, OSError):  # evicted just now by another process, or the disk fails: the rows are computed
            return StoredPart([], [])
        return StoredPart([], [])


def stored_share(space: Space, description: str, contents: Sequence[bytes]) -> float:
    """Share of images that have a row in a space. The rows are not verified, so that no shard is read.

    Args:
        space: The space.
        description: Description of its views.
        contents: The bytes of each file.
    """
    if not contents:
        return 0.0
    keys = as_keys([row_key(hashlib.sha256(content).digest(), description) for content in contents])
    return float((space.find(np.unique(keys, axis=0)).shard >= 0).mean())


class _Located:
    """Where the rows of images are in a space.

    Args:
        space: The space.
        description: Description of its views.
        digests: SHA-256 of the N images.
        verified: Shards that are not verified again.

    Attributes:
        is_stored: Whether each image has a row, bool ``(N,)``.
        shards: The shards of these rows.

    Raises:
        OSError: A shard cannot be read.
    """

    def __init__(self, space: Space, description: str, digests: Sequence[bytes], verified: Collection[Path]) -> None:
        keys = as_keys([row_key(digest, description) for digest in digests])
        self._space = space
        self._keys, inverse = np.unique(keys, axis=0, return_inverse=True)  # of N images, of which some may be equal
        self._inverse = inverse.reshape(-1)
        self._locations, _ = space.find_intact(self._keys, verified)
        self.shards = [shard.path for shard in self._locations.shards]
        self.is_stored = self._locations.shard[self._inverse] >= 0

    def read(self, positions: np.ndarray) -> torch.Tensor:
        """Rows ``(M, ...)`` of M images that are stored, on the CPU.

        Args:
            positions: Which images, int64 ``(M,)``.

        Raises:
            StoreError: Another process has removed rows.
            OSError: A shard cannot be read.
        """
        used, index = np.unique(self._inverse[positions], return_inverse=True)
        found = self._locations
        locations = RowLocations(found.shards, found.shard[used], found.row[used])
        rows = open_rows(self._space, self._keys[used], locations, sys.maxsize, torch.device("cpu"))
        try:
            return rows[torch.from_numpy(index.reshape(-1).astype(np.int64))]
        finally:
            rows.close()
