"""Stored rows in batches: from one tensor in memory, or read from the shards if the rows exceed the memory budget."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from project.data.samplers import EpochOrder
from project.errors import StoreError
from project.features.row_index import Keys
from project.features.store import RowLocations, Space
from project.runtime.system import read_at

#: Approximate size of an evaluation batch.
EVALUATION_BATCH_BYTES = 16 * 2**20
MAX_OPEN_FILES = 256


class MissingShardError(StoreError):
    """A shard no longer exists."""


class RowBatch(NamedTuple):
    """A batch of frozen features.

    Attributes:
        rows: Rows at the cut, ``(B, D)`` or ``(B, K, h, w)``.
        targets: int64 ``(B,)``.
        valid: Whether each row counts, bool ``(B,)``: false for padding.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor


class Rows:
    """Stored rows, accessed by index.

    Args:
        locations: Where the rows are stored; none is missing.
        memory_budget: Bytes that the rows may take in memory. Larger sets are read from disk batch by batch.
        device: Device of the rows in memory.

    Raises:
        MissingShardError: Another fit has removed a shard.
    """

    def __init__(self, locations: RowLocations, memory_budget: int, device: torch.device) -> None:
        self._locations = locations
        self._files: dict[int, int] = {}
        try:
            for number in range(min(len(locations.shards), MAX_OPEN_FILES)):  # open files survive eviction
                self._open(number)
        except MissingShardError:
            self.close()
            raise
        self._tensor: torch.Tensor | None = None
        if locations.shards and len(self) * self.row_bytes <= memory_budget:
            self._tensor = self._read(np.arange(len(self))).to(device)
            self.close()

    def __len__(self) -> int:
        return len(self._locations.row)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self._locations.shards[0].row_bytes

    @property
    def in_memory(self) -> bool:
        """Whether the rows are held in memory."""
        return self._tensor is not None

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, ...)`` at indices ``(B,)``, int32 or int64 on the CPU; on the device if held in memory."""
        if self._tensor is None:
            return self._read(index.numpy())
        return self._tensor[index.to(self._tensor.device)]

    def _read(self, index: np.ndarray) -> torch.Tensor:
        first, row_bytes = self._locations.shards[0], self.row_bytes
        rows = torch.empty((len(index), *first.shape), dtype=first.dtype)
        buffer = rows.view(-1).view(torch.uint8).numpy().data
        shard_numbers, shard_rows = self._locations.shard[index], self._locations.row[index]
        for i in np.lexsort((shard_rows, shard_numbers)).tolist():  # in the order on disk
            shard = self._locations.shards[shard_numbers[i]]
            offset = shard.offset + int(shard_rows[i]) * row_bytes
            target = buffer[i * row_bytes : (i + 1) * row_bytes]
            if read_at(self._open(int(shard_numbers[i])), target, offset) != row_bytes:
                raise OSError(f"{shard.path} is truncated: it ends before row {shard_rows[i]}")
        return rows

    def _open(self, number: int) -> int:
        """File descriptor of a shard."""
        if number not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self.close()
            path = self._locations.shards[number].path
            try:
                self._files[number] = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise MissingShardError(f"{path} was removed by another fit (merged or evicted). Run again.") from error
        return self._files[number]

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}


def open_rows(space: Space, keys: Keys, locations: RowLocations, memory_budget: int, device: torch.device) -> Rows:
    """Open rows. If another fit has merged their shards since they were located, locate them again.

    Args:
        space: Where the rows are stored.
        keys: Keys of the rows, uint64 ``(N, 2)``.
        locations: Result of :meth:`Space.find` for these keys.
        memory_budget: Bytes that the rows may take in memory.
        device: Device of the rows in memory.

    Raises:
        StoreError: Another fit has evicted rows.
    """
    while True:
        try:
            return Rows(locations, memory_budget, device)
        except MissingShardError:
            before, locations = locations, space.find(keys)
            if len(locations.missing) or locations.shards == before.shards:  # the latter: a dangling symbolic link
                raise


class RowLoader:
    """Batches of stored rows; replaces a DataLoader, without workers or collation.

    Args:
        rows: All rows.
        views: Indices of each image's rows, int32 or int64 ``(V, N)``: epoch e uses view e mod V.
        labels: int32 or int64 ``(N,)``.
        batch_size: Images per batch.
        order: Order of the images in an epoch.
        epoch: Returns the current epoch.
        evaluates: Whether the rows are used for evaluation, so that batches may be larger.
        skip_batches: Number of batches to skip at the start of the epoch: a resumed fit has trained on them.
    """

    def __init__(
        self,
        rows: Rows,
        views: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        order: EpochOrder,
        epoch: Callable[[], int],
        evaluates: bool = False,
        skip_batches: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rows = rows
        self._views = views
        self._labels = labels
        #: Rows per batch where no gradient is computed.
        self.evaluation_batch_size = max(batch_size, EVALUATION_BATCH_BYTES // rows.row_bytes)
        self.batch_size = self.evaluation_batch_size if evaluates else batch_size
        self._order = order
        self._epoch = epoch
        self._skip_batches = skip_batches

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    @property
    def view_count(self) -> int:
        """Number V of views per image."""
        return len(self._views)

    @property
    def labels(self) -> torch.Tensor:
        """Label of each image, int64 ``(N,)``, in the order of the split."""
        return self._labels.long()

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of all views of all images, by index ``(B,)``: index ``v * N + n`` is view v of image n."""
        return self._rows[self._views.view(-1)[indices]]

    def __iter__(self) -> Iterator[RowBatch]:
        epoch = self._epoch()
        view = self._views[epoch % len(self._views)]
        parts = zip(*(torch.split(part, self.batch_size) for part in self._order(epoch)), strict=True)
        for indices, valid in itertools.islice(parts, self._skip_batches(), None):
            yield RowBatch(self._rows[view[indices]], self._labels[indices].long(), valid)
