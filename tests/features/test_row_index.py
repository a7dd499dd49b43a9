"""Row index: a cache that avoids opening shards, and never the source of truth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from project.features import row_index, shard, store
from project.features.row_index import INDEX_FILE, read_index, write_index
from project.features.store import Space, as_keys
from tests.features.test_store import keys_from, read, values


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """A space with three indexed shards of 4 rows each: keys 0 to 11."""
    space = Space(tmp_path / "store", {"what": "these"})
    for number in range(3):
        space.write(keys_from(4 * number, 4), values(4, 5, seed=number))
    space.refresh_index()
    return space


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the shards that are opened."""
    paths: list[Path] = []
    original = store.open_shard
    monkeypatch.setattr(store, "open_shard", lambda path: (paths.append(path), original(path))[1])
    return paths


def test_lookup_opens_no_indexed_shard(space: Space, opened: list[Path]) -> None:
    found = space.find(keys_from(2, 20))
    assert not opened
    assert found.missing.tolist() == list(range(10, 20))
    assert len(found.shards) == 3 and {len(found.shard), len(found.row)} == {20}
    assert torch.equal(read(space, keys_from(4, 8)), torch.cat([values(4, 5, seed=n) for n in (1, 2)]))


def test_unindexed_shards_are_found(space: Space, opened: list[Path]) -> None:
    space.write(keys_from(12, 4), values(4, 5, seed=3))
    found = space.find(keys_from(0, 16))
    assert not len(found.missing) and len(opened) == 1
    assert torch.equal(read(space, keys_from(12, 4)), values(4, 5, seed=3))
    space.refresh_index()
    opened.clear()
    assert torch.equal(read(space, keys_from(0, 16)), torch.cat([values(4, 5, seed=n) for n in range(4)]))
    assert not opened


def test_few_new_rows_do_not_rewrite_a_large_index(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    space.write(keys_from(0, 100), values(100, 2))
    space.refresh_index()
    before = (space.path / INDEX_FILE).stat().st_mtime_ns
    space.write(keys_from(100, 4), values(4, 2))
    space.refresh_index()
    assert (space.path / INDEX_FILE).stat().st_mtime_ns == before
    assert not len(space.find(keys_from(0, 104)).missing)


def test_rows_of_removed_shards_are_missing(space: Space) -> None:
    removed = space.find(keys_from(4, 1)).shards[0].path
    removed.unlink()
    found = space.find(keys_from(0, 12))
    assert found.missing.tolist() == [4, 5, 6, 7]
    space.write(keys_from(4, 2), values(2, 5, seed=7))
    space.refresh_index()
    index = read_index(space.path / INDEX_FILE)
    assert index is not None and len(index) == 10 and removed.name not in index.shards
    assert torch.equal(read(space, keys_from(4, 2)), values(2, 5, seed=7))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "another version", "removed"])
def test_corrupt_index_is_ignored_and_rewritten(damage: str, space: Space, opened: list[Path]) -> None:
    path = space.path / INDEX_FILE
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[-60] ^= 1
    damaged = {
        "flipped": bytes(flipped),
        "truncated": intact[:-5],
        "empty": b"",
        "another version": intact.replace(b'"format": 1', b'"format": 9'),
    }
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    found = space.find(keys_from(0, 12))
    assert not len(found.missing) and len(opened) == 3
    space.refresh_index()
    assert path.read_bytes() != damaged.get(damage)
    opened.clear()
    assert not len(space.find(keys_from(0, 12)).missing) and not opened


def test_any_flipped_bit_in_an_index_is_detected(space: Space) -> None:
    path = space.path / INDEX_FILE
    intact = path.read_bytes()
    for at in range(0, len(intact), 7):
        path.unlink()
        path.write_bytes(intact[:at] + bytes([intact[at] ^ (1 << at % 8)]) + intact[at + 1 :])
        assert read_index(path) is None, f"byte {at}"


halves = st.integers(0, 5)
key_lists = st.lists(st.tuples(halves, halves), unique=True, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(key_lists, min_size=1, max_size=4), key_lists, st.data(), st.sampled_from([1, 2, 5, 100]))
def test_merged_index_finds_every_key(
    written: list[list[tuple[int, int]]], requested: list[tuple[int, int]], data: st.DataObject, chunk: int
) -> None:
    """Keys are drawn from few values, so that high halves collide and rows are stored twice."""
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(row_index, "CHUNK", chunk)
        path, index = Path(folder) / INDEX_FILE, None
        for number, part in enumerate(written):
            shards = {str(number): (None, np.array(part, np.uint64).reshape(-1, 2))}
            removed = {str(number - 1)} if number and data.draw(st.booleans()) else set()
            write_index(path, index, shards, removed)
            index = read_index(path)
            assert index is not None
        usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(index.shards), max_size=len(index.shards))))
        keys = np.array(requested, np.uint64).reshape(-1, 2)
        found: dict[int, tuple[str, int]] = {}
        names = list(index.shards)
        for match in index.look_up(keys, np.argsort(keys[:, 0]), usable.astype(bool)):
            found.update({int(i): (names[n], int(r)) for i, n, r in zip(*match, strict=True)})
        usable_names = [name for name, is_usable in zip(names, usable, strict=True) if is_usable]
        for i, key in enumerate(requested):
            expected = [(name, written[int(name)].index(key)) for name in usable_names if key in written[int(name)]]
            assert (found[i] in expected) if expected else i not in found


def test_shard_is_verified_once_per_process_unless_it_changes(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    original = shard.file_sha256
    monkeypatch.setattr(shard, "file_sha256", lambda path: (hashed.append(path), original(path))[1])
    found = space.find(keys_from(0, 8))
    assert space.verify(found) == [] and len(hashed) == 2, "only shards in use are hashed"
    assert space.verify(space.find(keys_from(0, 12))) == [] and len(hashed) == 3
    path = found.shards[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert space.verify(found) == [path]
    space.find_intact(keys_from(0, 8))
    assert not path.exists() and path.with_suffix(store.QUARANTINE_SUFFIX).exists()


def test_compaction_merges_small_shards_only(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    for number in range(6):
        space.write(keys_from(4 * number, 4), values(4, 64, seed=number))
    space.write(keys_from(24, 40), values(40, 64, seed=6))
    space.write(keys_from(22, 3), values(3, 64, seed=9))  # concurrent builders may write the same row
    large = space.find(keys_from(30, 1)).shards[0].path
    before = {*space.shards()}
    space.compact(before, 3 * max(path.stat().st_size for path in before - {large}))
    after = {*space.shards()}
    assert large in after and 3 <= len(after) <= 5 < len(before)
    found = space.find(keys_from(0, 64))
    assert not len(found.missing) and not space.verify(found)
    assert torch.equal(read(space, keys_from(0, 22)), torch.cat([values(4, 64, seed=n) for n in range(6)])[:22])


def test_shard_that_contains_all_others_survives_compaction(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    rows = values(4, 5)
    space.write(keys_from(0, 4), rows)
    space.write(keys_from(1, 2), rows[1:3])
    space.compact(space.shards(), 2**20)
    assert len(space.shards()) == 1 and torch.equal(read(space, keys_from(0, 4)), rows)


def test_corrupt_shard_is_not_merged(space: Space) -> None:
    path = space.find(keys_from(4, 1)).shards[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    space.compact(space.shards(), 2**20)
    assert path.exists() and len(space.shards()) == 2
    assert space.verify(space.find(keys_from(0, 12))) == [path]


def test_killed_compaction_loses_no_row(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.unlink

    def fail(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".safetensors" and not self.name.startswith("."):
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", fail)
        space.compact(space.shards(), 2**20)
    assert torch.equal(read(space, keys_from(0, 12)), torch.cat([values(4, 5, seed=n) for n in range(3)]))


def test_keys_with_equal_high_halves_are_distinguished(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    one, other = as_keys([bytes(16), bytes(8) + b"\1" * 8]), as_keys([bytes(8) + b"\2" * 8])
    space.write(one, values(2, 3))
    space.refresh_index()
    assert space.find(other).missing.tolist() == [0]
    assert torch.equal(read(space, one), values(2, 3))
