"""Row loader: each row once per epoch, in an order determined by seed and epoch."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from project.data.samplers import EpochOrder
from project.features.row_loader import RowBatch, RowLoader, Rows
from project.features.store import Space, as_keys, row_key

CPU = torch.device("cpu")


def make_rows(folder: Path, count: int, memory_budget: int = 2**40) -> Rows:
    """Rows 0, 1, 2 … of width 3, in shards of 7."""
    space = Space(folder, {})
    keys = as_keys([row_key(str(number).encode(), "") for number in range(count)])
    for part in torch.arange(count).split(7):
        space.write(keys[part.numpy()], part.float()[:, None].expand(-1, 3).contiguous())
    return Rows(space.find(keys), memory_budget, CPU)


class FakeRows:
    """Rows without a store: row i is ``[i]``. They claim to be large, so that evaluation batches are not enlarged."""

    row_bytes = 2**40

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return index.float()[:, None]


def make_loader(
    count: int, batch_size: int, shuffle: bool, epoch: int = 0, rows: Rows | None = None, **options: int
) -> RowLoader:
    views = torch.arange(count)[None]
    labels = 100 + torch.arange(count)
    order = EpochOrder(count, shuffle, batch_size=batch_size, **options)
    return RowLoader(rows or FakeRows(), views, labels, batch_size, order, lambda: epoch)  # type: ignore[arg-type]


def row_batches(loader: RowLoader) -> list[list[int]]:
    """The rows of each batch, without padding."""
    batches = list(loader)
    assert len(batches) == len(loader)
    for batch in batches:
        assert isinstance(batch, RowBatch)
        assert torch.equal(batch.rows[:, 0].long() + 100, batch.targets), "each row has its label"
    return [(batch.targets[batch.valid] - 100).tolist() for batch in batches]


def row_order(loader: RowLoader) -> list[int]:
    return [row for batch in row_batches(loader) for row in batch]


def test_shuffling_depends_on_epoch_and_seed_only() -> None:
    first, second = (row_order(make_loader(20, 6, True, epoch)) for epoch in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(20))
    assert row_order(make_loader(20, 6, True, 0)) == first, "the same epoch and seed"
    assert row_order(make_loader(20, 6, True, 0, seed=1)) != first
    assert row_order(make_loader(20, 6, False, 0)) == row_order(make_loader(20, 6, False, 1)) == list(range(20))


def test_loader_can_be_iterated_repeatedly() -> None:
    loader = make_loader(20, 6, True)
    assert row_order(loader) == row_order(loader)


@pytest.mark.parametrize(
    ("count", "batch_size", "shuffle", "expected"),
    [(13, 4, True, 12), (13, 4, False, 13), (12, 4, True, 12), (1, 4, True, 1), (5, 1, True, 5), (14, 4, True, 14)],
)
def test_last_batch_of_one_is_dropped_in_training_only(
    count: int, batch_size: int, shuffle: bool, expected: int
) -> None:
    assert len(row_order(make_loader(count, batch_size, shuffle))) == expected


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world=st.sampled_from([1, 2, 3, 5]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_share_the_batches_of_a_single_process(
    count: int, batch_size: int, world: int, shuffle: bool, epoch: int, seed: int
) -> None:
    single = row_batches(make_loader(count, batch_size * world, shuffle, epoch, seed=seed))
    loaders = [
        make_loader(count, batch_size, shuffle, epoch, seed=seed, world_size=world, rank=rank) for rank in range(world)
    ]
    sizes = {len(batch.rows) for step in zip(*loaders, strict=True) for batch in step}
    assert len(sizes) <= 2, "full batches, and a last one"
    ranks = [row_batches(loader) for loader in loaders]
    assert [sorted(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == [sorted(batch) for batch in single]
    if not shuffle:
        assert sorted(row for batches in ranks for batch in batches for row in batch) == list(range(count)), "each once"


@given(count=st.integers(3, 60), batch_size=st.integers(2, 20), world=st.sampled_from([2, 3, 5]))
def test_no_rank_trains_on_a_batch_of_one(count: int, batch_size: int, world: int) -> None:
    for rank in range(world):
        batches = list(make_loader(count, batch_size, True, world_size=world, rank=rank))
        assert all(len(batch.rows) > 1 for batch in batches), "BatchNorm needs two rows; padding counts"


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_from_disk_equal_rows_in_memory(shuffle: bool, tmp_path: Path) -> None:
    in_memory, on_disk = make_rows(tmp_path, 20), make_rows(tmp_path, 20, memory_budget=0)
    assert in_memory.in_memory and not on_disk.in_memory
    for epoch in range(3):
        loaders = [make_loader(20, 6, shuffle, epoch, rows) for rows in (in_memory, on_disk)]
        for a, b in zip(*loaders, strict=True):
            assert torch.equal(a.rows, b.rows) and torch.equal(a.targets, b.targets)
    on_disk.close()


def test_rows_stay_readable_after_eviction(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 20, memory_budget=0)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert rows[torch.arange(20)][:, 0].tolist() == list(range(20))
    rows.close()


def test_shard_truncated_after_opening_is_named(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 7, memory_budget=0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=path.name):
        rows[torch.tensor([6])]
    rows.close()


def test_views_rotate_over_epochs() -> None:
    views = torch.stack([torch.arange(4), 10 + torch.arange(4)])
    for epoch in range(4):
        loader = RowLoader(FakeRows(), views, torch.zeros(4), 2, EpochOrder(4, True), lambda epoch=epoch: epoch)  # type: ignore[arg-type,misc]
        rows = sorted(int(row) for batch in loader for row in batch.rows[:, 0])
        assert rows == [number + 10 * (epoch % 2) for number in range(4)]
