"""The index of a space: a hint that saves reading the shards, and never the truth."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from project.features import row_index, shard, store
from project.features.row_index import FILE, read_index, write_index
from project.features.store import Space, as_keys
from tests.features.test_store import keys_from, read, values


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """Three shards of 4 rows, keys 0 to 11, all in the index."""
    space = Space(tmp_path / "store", {"what": "these"})
    for number in range(3):
        space.write(keys_from(4 * number, 4), values(4, 5, seed=number))
    space.refresh_index()
    return space


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards whose keys are read."""
    found: list[Path] = []
    original = store.open_shard
    monkeypatch.setattr(store, "open_shard", lambda path: (found.append(path), original(path))[1])
    return found


def test_a_look_up_opens_no_shard_that_is_in_the_index(space: Space, opened: list[Path]) -> None:
    found = space.find(keys_from(2, 20))
    assert not opened
    assert found.missing.tolist() == list(range(10, 20))
    assert len(found.shards) == 3 and {len(found.shard), len(found.index)} == {20}
    assert torch.equal(read(space, keys_from(4, 8)), torch.cat([values(4, 5, seed=n) for n in (1, 2)]))


def test_shards_that_appear_later_are_found_beside_it(space: Space, opened: list[Path]) -> None:
    space.write(keys_from(12, 4), values(4, 5, seed=3))
    found = space.find(keys_from(0, 16))
    assert not len(found.missing) and len(opened) == 1
    assert torch.equal(read(space, keys_from(12, 4)), values(4, 5, seed=3))
    space.refresh_index()
    opened.clear()
    assert torch.equal(read(space, keys_from(0, 16)), torch.cat([values(4, 5, seed=n) for n in range(4)]))
    assert not opened


def test_a_few_new_rows_do_not_write_a_large_index_anew(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    space.write(keys_from(0, 100), values(100, 2))
    space.refresh_index()
    before = (space.path / FILE).stat().st_mtime_ns
    space.write(keys_from(100, 4), values(4, 2))
    space.refresh_index()
    assert (space.path / FILE).stat().st_mtime_ns == before
    assert not len(space.find(keys_from(0, 104)).missing)


def test_rows_of_shards_that_are_gone_are_missing(space: Space) -> None:
    gone = space.find(keys_from(4, 1)).shards[0].path
    gone.unlink()
    found = space.find(keys_from(0, 12))
    assert found.missing.tolist() == [4, 5, 6, 7]
    space.write(keys_from(4, 2), values(2, 5, seed=7))
    space.refresh_index()
    index = read_index(space.path / FILE)
    assert index is not None and len(index) == 10 and gone.name not in index.shards
    assert torch.equal(read(space, keys_from(4, 2)), values(2, 5, seed=7))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "another version", "removed"])
def test_a_damaged_index_is_ignored_and_made_anew(damage: str, space: Space, opened: list[Path]) -> None:
    path = space.path / FILE
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-60] ^= 1
    damaged = {
        "flipped": bytes(content),
        "truncated": whole[:-5],
        "empty": b"",
        "another version": whole.replace(b'"format": 1', b'"format": 9'),
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


def test_every_bit_of_an_index_counts(space: Space) -> None:
    path = space.path / FILE
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.unlink()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert read_index(path) is None, f"byte {place}"


halves = st.integers(0, 5)
keys = st.lists(st.tuples(halves, halves), unique=True, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(keys, min_size=1, max_size=4), keys, st.data(), st.sampled_from([1, 2, 5, 100]))
def test_indices_that_are_merged_in_parts_find_every_key(
    written: list[list[tuple[int, int]]], asked: list[tuple[int, int]], data: st.DataObject, chunk: int
) -> None:
    """Of so few keys that halves of them are equal, and that rows are stored twice."""
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(row_index, "CHUNK", chunk)
        path, index = Path(folder) / FILE, None
        for number, part in enumerate(written):
            shards = {str(number): (None, np.array(part, np.uint64).reshape(-1, 2))}
            gone = {str(number - 1)} if number and data.draw(st.booleans()) else set()
            write_index(path, index, shards, gone)
            index = read_index(path)
            assert index is not None
        usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(index.shards), max_size=len(index.shards))))
        wanted = np.array(asked, np.uint64).reshape(-1, 2)
        found: dict[int, tuple[str, int]] = {}
        names = list(index.shards)

        def take(which: np.ndarray, number: np.ndarray, row: np.ndarray) -> None:
            found.update({int(w): (names[n], int(r)) for w, n, r in zip(which, number, row, strict=True)})

        index.look_up(wanted, np.argsort(wanted[:, 0]), usable.astype(bool), take)
        held = [name for name, counts in zip(names, usable, strict=True) if counts]
        for at, key in enumerate(asked):
            places = [(name, written[int(name)].index(key)) for name in held if key in written[int(name)]]
            assert (found[at] in places) if places else at not in found


def test_a_shard_is_verified_once_per_process_unless_it_changes(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    read_whole: list[Path] = []
    original = shard.file_sha256
    monkeypatch.setattr(shard, "file_sha256", lambda path: (read_whole.append(path), original(path))[1])
    found = space.find(keys_from(0, 8))
    assert space.verify(found) == [] and len(read_whole) == 2, "those whose rows are used"
    assert space.verify(space.find(keys_from(0, 12))) == [] and len(read_whole) == 3
    path = found.shards[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert space.verify(found) == [path]
    space.quarantine([path])
    assert not path.exists() and path.with_suffix(store.DAMAGED).exists()


def test_small_shards_are_merged_and_large_ones_are_left(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    for number in range(6):
        space.write(keys_from(4 * number, 4), values(4, 64, seed=number))
    space.write(keys_from(24, 40), values(40, 64, seed=6))
    space.write(keys_from(22, 3), values(3, 64, seed=9))  # two builders at once may both write a row
    large = space.find(keys_from(30, 1)).shards[0].path
    before = {*space.shards()}
    space.compact(before, 3 * max(path.stat().st_size for path in before - {large}))
    after = {*space.shards()}
    assert large in after and 3 <= len(after) <= 5 < len(before)
    everything = space.find(keys_from(0, 64))
    assert not len(everything.missing) and not space.verify(everything)
    assert torch.equal(read(space, keys_from(0, 22)), torch.cat([values(4, 64, seed=n) for n in range(6)])[:22])


def test_a_shard_that_has_the_rows_of_the_others_is_what_they_merge_into(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    rows = values(4, 5)
    space.write(keys_from(0, 4), rows)
    space.write(keys_from(1, 2), rows[1:3])
    space.compact(space.shards(), 2**20)
    assert len(space.shards()) == 1 and torch.equal(read(space, keys_from(0, 4)), rows)


def test_a_damaged_shard_is_not_merged(space: Space) -> None:
    path = space.find(keys_from(4, 1)).shards[0].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    space.compact(space.shards(), 2**20)
    assert path.exists() and len(space.shards()) == 2
    assert space.verify(space.find(keys_from(0, 12))) == [path]


def test_a_merge_that_is_killed_loses_nothing(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".safetensors" and not self.name.startswith("."):
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        space.compact(space.shards(), 2**20)
    assert torch.equal(read(space, keys_from(0, 12)), torch.cat([values(4, 5, seed=n) for n in range(3)]))


def test_an_index_takes_no_key_for_another(tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    one, other = as_keys([bytes(16), bytes(8) + b"\1" * 8]), as_keys([bytes(8) + b"\2" * 8])
    space.write(one, values(2, 3))
    space.refresh_index()
    assert space.find(other).missing.tolist() == [0]
    assert torch.equal(read(space, one), values(2, 3))
