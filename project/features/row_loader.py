"""Stored rows as batches: slices of one tensor in memory, or reads from the shards where that would be too large."""

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
from project.features.shard import Shard
from project.features.store import Found, Space
from project.runtime.system import read_at

#: Bytes of a batch of evaluation, about.
EVALUATED = 16 * 2**20
OPEN = 256  # files at a time


class MissingShardError(StoreError):
    """A file of rows is gone."""


class RowBatch(NamedTuple):
    """A batch whose images have been through the frozen prefix already.

    Attributes:
        rows: Rows at the cut, ``(B, D)`` or ``(B, K, h, w)``.
        targets: int64 ``(B,)``.
        valid: Whether each row counts, bool ``(B,)``: false for padding.
    """

    rows: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor


class Rows:
    """Rows by index.

    Args:
        found: Where they are; none is missing.
        memory: Bytes that may be held in memory. Rows that take more are read from disk, batch by batch.
        device: Where those in memory are held.

    Raises:
        MissingShardError: Another fit has removed a file.
    """

    def __init__(self, found: Found, memory: int, device: torch.device) -> None:
        self._found = found
        self._files: dict[int, int] = {}
        try:
            for number in range(min(len(found.shards), OPEN)):  # once they are open, they stay, whoever removes them
                self._file(number)
        except MissingShardError:
            self.close()
            raise
        self._held: torch.Tensor | None = None
        if found.shards and len(found.index) * found.shards[0].row_bytes <= memory:
            self._held = self._read(np.arange(len(found.index))).to(device)
            self.close()

    def __len__(self) -> int:
        return len(self._found.index)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return self._found.shards[0].row_bytes

    @property
    def in_memory(self) -> bool:
        """Whether they are in memory."""
        return self._held is not None

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, ...)`` at indices ``(B,)``, int32 or int64 on the CPU; they are where they are held."""
        if self._held is None:
            return self._read(index.numpy())
        return self._held[index.to(self._held.device)]

    def _read(self, index: np.ndarray) -> torch.Tensor:
        shard: Shard = self._found.shards[0]
        rows = torch.empty((len(index), *shard.shape), dtype=shard.dtype)
        into = rows.view(-1).view(torch.uint8).numpy().data
        which, where = self._found.shard[index], self._found.index[index]
        for place in np.lexsort((where, which)).tolist():
            at = self._found.shards[which[place]]
            offset = at.offset + int(where[place]) * at.row_bytes
            target = into[place * at.row_bytes : (place + 1) * at.row_bytes]
            if read_at(self._file(int(which[place])), target, offset) != at.row_bytes:
                raise OSError(f"{at.path} ended before its row {where[place]}")
        return rows

    def _file(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= OPEN:
                self.close()
            path = self._found.shards[number].path
            try:
                self._files[number] = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise MissingShardError(
                    f"{path} was removed by another fit, which merged it with others or made room. Run again."
                ) from error
        return self._files[number]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}


def open_rows(space: Space, keys: Keys, found: Found, memory: int, device: torch.device) -> Rows:
    """Open rows. Another fit may merge their files between the lookup and now; then they are looked up again.

    Args:
        space: Where they are stored.
        keys: Of the rows, uint64 ``(N, 2)``.
        found: Where they were found.
        memory: Bytes that may be held in memory.
        device: Where those in memory are held.

    Raises:
        StoreError: Another fit has removed some, to make room.
    """
    while True:
        try:
            return Rows(found, memory, device)
        except MissingShardError:
            before, found = found, space.find(keys)
            if len(found.missing) or found.shards == before.shards:  # a link that leads nowhere is listed for ever
                raise


class RowLoader:
    """Batches of rows, in place of a DataLoader: no process, no collation, an index a batch.

    Args:
        rows: All rows.
        views: Which of them are each image's, int32 or int64 ``(V, N)``: view e mod V is taken in epoch e.
        labels: int32 or int64 ``(N,)``.
        batch_size: Images a batch.
        order: In which order they come.
        epoch: Says which epoch it is.
        evaluates: Nothing is learnt, so that batches may be larger.
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
        self.batch_size = max(batch_size, EVALUATED // rows.row_bytes) if evaluates else batch_size
        self._order = order
        self._epoch = epoch
        self._skip_batches = skip_batches

    def __len__(self) -> int:
        return -(-len(self._order) // self.batch_size)

    def __iter__(self) -> Iterator[RowBatch]:
        epoch = self._epoch()
        view = self._views[epoch % len(self._views)]
        parts = zip(*(torch.split(part, self.batch_size) for part in self._order(epoch)), strict=True)
        for indices, valid in itertools.islice(parts, self._skip_batches(), None):
            yield RowBatch(self._rows[view[indices]], self._labels[indices].long(), valid)
