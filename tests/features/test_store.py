"""Rows on disk: what was written is found bit for bit, and what is damaged is not found."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from project.errors import StoreError
from project.features.row_loader import Rows, open_rows
from project.features.store import Found, Space, as_keys, evict_shards, row_key
from tests.conftest import STORED, draw

CPU = torch.device("cpu")
ALL = 2**40


def keys_from(start: int, count: int) -> np.ndarray:
    return as_keys([row_key(number.to_bytes(4, "big"), "") for number in range(start, start + count)])


def values(count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sound(space: Space, keys: np.ndarray) -> tuple[Found, int]:
    """Rows whose shards are sound, as a fit has them, and how many shards were damaged."""
    found = space.find(keys)
    damaged = space.verify(found)
    space.quarantine(damaged)
    return space.find(keys, damaged), len(damaged)


def read(space: Space, keys: np.ndarray) -> torch.Tensor:
    found, _ = sound(space, keys)
    assert not len(found.missing)
    return Rows(found, ALL, CPU)[torch.arange(len(keys))]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """A space with three shards of 4 rows: keys 0 to 11."""
    space = Space(tmp_path / "store", {"what": "these"})
    for number in range(3):
        space.write(keys_from(4 * number, 4), values(4, 5, seed=number))
    return space


def shard_of(space: Space, number: int) -> Path:
    found = space.find(keys_from(4 * number, 1))
    return found.shards[0].path


@pytest.mark.parametrize("memory", [ALL, 0], ids=["in memory", "from disk"])
@pytest.mark.parametrize("shape", [(7,), (3, 2, 4)], ids=["features", "maps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], memory: int, tmp_path: Path) -> None:
    space = Space(tmp_path, {})
    keys, written = keys_from(0, 9), values(9, *shape, dtype=dtype)
    written[0].view(-1)[0] = float("nan")
    space.write(keys[:4], written[:4])
    space.write(keys[4:], written[4:])
    order = torch.tensor([8, 0, 3, 3, 5])
    rows = Rows(Space(tmp_path, {}).find(keys), memory, CPU)
    assert rows.in_memory == (memory > 0) and len(rows) == 9
    assert rows[order].dtype == dtype
    assert torch.equal(rows[order].contiguous().view(torch.uint8), written[order].contiguous().view(torch.uint8))
    rows.close()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.binary(min_size=16, max_size=16), max_size=6), max_size=4),
    st.lists(st.binary(min_size=16, max_size=16), max_size=4),
)
def test_any_keys_in_any_number_of_shards_are_found_and_others_are_missing(
    shards: list[list[bytes]], others: list[bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        space = Space(Path(folder), {})
        written: dict[bytes, float] = {}
        for keys in shards:
            new = list(dict.fromkeys(keys))
            if new:
                space.write(as_keys(new), torch.tensor([[written.setdefault(k, float(len(written)))] for k in new]))
        asked = list(dict.fromkeys([*others, *written]))
        held = [i for i, key in enumerate(asked) if key in written]
        for _ in range(2):  # without an index, and with one
            found = space.find(as_keys(asked))
            assert {asked[i] for i in found.missing} == set(asked) - set(written)
            if held:
                rows = Rows(found, 0, CPU)
                assert rows[torch.tensor(held)].squeeze(1).tolist() == [written[asked[i]] for i in held]
                rows.close()
            space.refresh_index()


def test_rows_of_another_description_are_not_found(space: Space) -> None:
    assert len(Space(space.path.parent, {"what": "those"}).find(keys_from(0, 12)).missing) == 12


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 2)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {"truncated": _truncate, "empty": _empty, "garbage": _garbage, "longer": _grow}


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_of_a_damaged_shard_are_not_found_and_the_others_are(damage: str, space: Space) -> None:
    bad = shard_of(space, 1)
    DAMAGES[damage](bad)
    found, damaged = sound(space, keys_from(0, 12))
    assert found.missing.tolist() == [4, 5, 6, 7]
    assert damaged == 1
    assert not bad.exists()
    assert torch.equal(read(space, keys_from(8, 4)), values(4, 5, seed=2))
    space.write(keys_from(4, 4), values(4, 5, seed=1))
    assert torch.equal(read(space, keys_from(4, 4)), values(4, 5, seed=1))


def test_a_flipped_bit_is_never_read_wherever_it_is(space: Space) -> None:
    bad = shard_of(space, 1)
    whole = bad.read_bytes()
    for place in range(len(whole)):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        found, _ = sound(space, keys_from(0, 12))
        assert found.missing.tolist() == [4, 5, 6, 7], f"byte {place}"
        assert not bad.exists()


def test_a_file_that_cannot_be_removed_is_not_used_either(space: Space, mount: Callable[..., None]) -> None:
    _truncate(shard_of(space, 1))
    mount("--bind", str(space.path), str(space.path))
    mount("-o", "remount,bind,ro", str(space.path))
    for _ in range(2):
        found, damaged = sound(space, keys_from(0, 12))
        assert found.missing.tolist() == [4, 5, 6, 7] and damaged == 1


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_fit_computes_what_a_damaged_shard_held_and_no_more(
    damage: str, rows: Callable[..., tuple[int, int]], album: Path
) -> None:
    (album / "train/red/0.png").rename("aside.png")
    assert rows("--data.root", "album") == (0, 35)
    Path("aside.png").rename(album / "train/red/0.png")
    assert rows("--data.root", "album") == (35, 1)
    small = min(Path("store").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    DAMAGES[damage](small)
    assert rows("--data.root", "album") == (35, 1)
    assert rows("--data.root", "album") == (36, 0)


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated"])
def test_a_fit_says_that_files_were_damaged(
    damage: str, fit: Callable[..., int], rows: Callable[..., tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows()
    (shard,) = Path("store").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content if damage == "a flipped bit" else content[:-1])
    assert fit(*STORED) == 0
    assert "1 corrupt cache files were discarded and recomputed" in capsys.readouterr().out


def test_the_shards_used_least_recently_make_room(tmp_path: Path) -> None:
    spaces = [Space(tmp_path, {"number": number}) for number in range(4)]
    for number, space in enumerate(spaces):
        space.write(keys_from(0, 4), values(4, 5))
        space.write(keys_from(4, 4), values(4, 5, seed=1))
        for shard, path in enumerate(sorted(space.path.glob("*.safetensors"))):
            os.utime(path, (1000, 1000 + 10 * number + shard))
    size = next(spaces[0].path.glob("*.safetensors")).stat().st_size
    sound(spaces[1], keys_from(0, 8))  # now it is the one used last
    in_use = set(spaces[0].path.glob("*.safetensors"))
    assert evict_shards(tmp_path, 5 * size + 1, keep=in_use) == 3 * size
    left = [len(list(space.path.glob("*.safetensors"))) for space in spaces]
    assert left == [2, 2, 0, 1], "the space in use stays, though it is the oldest"
    assert evict_shards(tmp_path, 5 * size, keep=in_use) == 0


def test_a_fit_keeps_the_store_in_its_budget(rows: Callable[..., tuple[int, int]], here: Path) -> None:
    budget = ["--features.budget", f"{2.5 * 36 * 512 * 4 / 1e9:.9f}"]
    for size in ("32", "40", "48", "40"):
        rows("--model.image_size", size, *budget)
        held = sum(path.stat().st_size for path in Path("store").rglob("*.safetensors"))
        assert held <= 2.5 * 36 * 512 * 4
    assert rows(*budget) == (0, 36), "48 px took its place"
    assert rows("--model.image_size", "40", *budget) == (36, 0)


def test_rows_of_other_images_in_the_space_in_use_make_room_too(
    rows: Callable[..., tuple[int, int]], album: Path
) -> None:
    most = int(1.5 * 36 * 512 * 4)
    for number in range(3):
        for at, path in enumerate(sorted(album.rglob("*.png"))):
            draw(path, (9, 9, 9), 1000 * number + at)
        rows("--data.root", "album", "--features.budget", f"{most / 1e9:.9f}")
    assert sum(path.stat().st_size for path in Path("store").rglob("*.safetensors")) <= most


def test_nothing_is_evicted_while_all_fits(rows: Callable[..., tuple[int, int]], album: Path) -> None:
    budget = ["--data.root", "album", "--features.budget", f"{2.8 * 36 * 512 * 4 / 1e9:.9f}"]
    assert rows("--model.image_size", "40", *budget) == (0, 36)
    assert rows(*budget) == (0, 36)
    draw(album / "train/red/new.png", (200, 0, 0), 99)
    assert rows(*budget) == (36, 1)
    (album / "train/red/new.png").unlink()
    assert rows("--model.image_size", "40", *budget) == (36, 0)


@pytest.mark.parametrize("memory", [ALL, 0], ids=["in memory", "from disk"])
def test_rows_that_another_fit_merges_after_the_lookup_are_looked_up_again(space: Space, memory: int) -> None:
    keys = keys_from(0, 12)
    found = space.find(keys)
    space.compact(space.shards(), 2**20)
    assert len(space.shards()) == 1, "the files that were found are gone"
    rows = open_rows(space, keys, found, memory, CPU)
    assert torch.equal(rows[torch.arange(12)], torch.cat([values(4, 5, seed=number) for number in range(3)]))
    rows.close()


def test_rows_that_another_fit_removes_after_the_lookup_are_reported(space: Space) -> None:
    keys = keys_from(0, 12)
    found = space.find(keys)
    shard_of(space, 1).unlink()
    with pytest.raises(StoreError, match="was removed by another fit"):
        open_rows(space, keys, found, ALL, CPU)


def test_a_link_that_leads_nowhere_is_reported_rather_than_looked_up_for_ever(space: Space) -> None:
    space.refresh_index()
    keys = keys_from(0, 12)
    found = space.find(keys)
    path = shard_of(space, 1)
    path.unlink()
    path.symlink_to("/nowhere/at/all")
    with pytest.raises(StoreError, match="was removed by another fit"):
        open_rows(space, keys, found, ALL, CPU)
