"""Batches of stored rows: each row once an epoch, in an order that the seed and the epoch give."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from project.data.samplers import EpochOrder
from project.features.row_loader import RowBatch, RowLoader, Rows
from project.features.store import Space, as_keys, row_key

CPU = torch.device("cpu")
Loader = Callable[..., RowLoader]


def stored(folder: Path, count: int, memory: int = 2**40) -> Rows:
    """Rows 0, 1, 2 … of width 3, in shards of 7."""
    space = Space(folder, {})
    keys = as_keys([row_key(str(number).encode(), "") for number in range(count)])
    for part in torch.arange(count).split(7):
        space.write(keys[part.numpy()], part.float()[:, None].expand(-1, 3).contiguous())
    return Rows(space.find(keys), memory, CPU)


class Numbers:
    """Rows without a disk: row i is i, and so large that batches of evaluation are no larger than asked for."""

    row_bytes = 2**40

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return index.float()[:, None]


def loader(
    count: int, batch_size: int, shuffle: bool, epoch: int = 0, rows: Rows | None = None, **more: int
) -> RowLoader:
    place = torch.arange(count)[None]
    held = Numbers() if rows is None else rows
    labels = 100 + torch.arange(count)
    taken = EpochOrder(count, shuffle, batch_size=batch_size, **more)
    return RowLoader(held, place, labels, batch_size, taken, lambda: epoch)  # type: ignore[arg-type]


def parts(batches: RowLoader) -> list[list[int]]:
    """The rows of each batch that are no padding."""
    found = list(batches)
    assert len(found) == len(batches)
    for batch in found:
        assert isinstance(batch, RowBatch)
        assert torch.equal(batch.rows[:, 0].long() + 100, batch.targets), "each row has its label"
    return [(batch.targets[batch.valid] - 100).tolist() for batch in found]


def order(batches: RowLoader) -> list[int]:
    return [row for part in parts(batches) for row in part]


def test_training_shuffles_each_epoch_otherwise_and_the_same_way_again() -> None:
    first, second = (order(loader(20, 6, True, epoch)) for epoch in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(20))
    assert order(loader(20, 6, True, 0)) == first, "the same epoch and seed"
    assert order(loader(20, 6, True, 0, seed=1)) != first
    assert order(loader(20, 6, False, 0)) == order(loader(20, 6, False, 1)) == list(range(20))


def test_a_loader_may_be_gone_through_again() -> None:
    batches = loader(20, 6, True)
    assert order(batches) == order(batches)


@pytest.mark.parametrize(
    ("count", "batch_size", "shuffle", "kept"),
    [(13, 4, True, 12), (13, 4, False, 13), (12, 4, True, 12), (1, 4, True, 1), (5, 1, True, 5), (14, 4, True, 14)],
)
def test_a_last_batch_of_one_is_left_out_of_training_alone(
    count: int, batch_size: int, shuffle: bool, kept: int
) -> None:
    assert len(order(loader(count, batch_size, shuffle))) == kept


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world=st.sampled_from([1, 2, 3, 5]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_processes_share_the_batches_that_one_would_have(
    count: int, batch_size: int, world: int, shuffle: bool, epoch: int, seed: int
) -> None:
    one = parts(loader(count, batch_size * world, shuffle, epoch, seed=seed))
    loaders = [
        loader(count, batch_size, shuffle, epoch, seed=seed, world_size=world, rank=rank) for rank in range(world)
    ]
    assert len({len(batch.rows) for part in zip(*loaders, strict=True) for batch in part}) <= 2, "whole, or the last"
    shares = [parts(batches) for batches in loaders]
    assert [sorted(itertools.chain(*each)) for each in zip(*shares, strict=True)] == [sorted(batch) for batch in one]
    if not shuffle:
        assert sorted(row for share in shares for part in share for row in part) == list(range(count)), "each once"


@given(count=st.integers(3, 60), batch_size=st.integers(2, 20), world=st.sampled_from([2, 3, 5]))
def test_no_process_trains_on_a_batch_of_one(count: int, batch_size: int, world: int) -> None:
    for rank in range(world):
        batches = list(loader(count, batch_size, True, world_size=world, rank=rank))
        assert all(len(batch.rows) > 1 for batch in batches), "BatchNorm could not; padding comes along"


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_read_from_disk_are_those_in_memory(shuffle: bool, tmp_path: Path) -> None:
    held, read = stored(tmp_path, 20), stored(tmp_path, 20, memory=0)
    assert held.in_memory and not read.in_memory
    for epoch in range(3):
        parts = [list(loader(20, 6, shuffle, epoch, rows)) for rows in (held, read)]
        for one, other in zip(*parts, strict=True):
            assert torch.equal(one.rows, other.rows) and torch.equal(one.targets, other.targets)
    read.close()


def test_rows_stay_readable_when_their_files_are_evicted(tmp_path: Path) -> None:
    rows = stored(tmp_path, 20, memory=0)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert rows[torch.arange(20)][:, 0].tolist() == list(range(20))
    rows.close()


def test_a_shard_that_shrinks_under_way_is_an_error_with_its_name(tmp_path: Path) -> None:
    rows = stored(tmp_path, 7, memory=0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=path.name):
        rows[torch.tensor([6])]
    rows.close()


def test_views_are_taken_in_turn() -> None:
    place = torch.stack([torch.arange(4), 10 + torch.arange(4)])
    for epoch in range(4):
        batches = RowLoader(Numbers(), place, torch.zeros(4), 2, EpochOrder(4, True), lambda epoch=epoch: epoch)  # type: ignore[arg-type,misc]
        seen = sorted(int(row) for batch in batches for row in batch.rows[:, 0])
        assert seen == [number + 10 * (epoch % 2) for number in range(4)]
