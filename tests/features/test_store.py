"""Feature store: rows are read back bit for bit, and corrupt ones are never used."""

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
from project.features.store import Space, as_keys, evict_shards, row_key
from tests.conftest import FEATURES, STORED, draw

CPU = torch.device("cpu")
UNLIMITED = 2**40


def keys_from(start: int, count: int) -> np.ndarray:
    return as_keys([row_key(number.to_bytes(4, "big"), "") for number in range(start, start + count)])


def values(count: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(space: Space, keys: np.ndarray) -> torch.Tensor:
    found, _ = space.find_intact(keys)
    assert not len(found.missing)
    return Rows(found, UNLIMITED, CPU)[torch.arange(len(keys))]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    """A space with three shards of 4 rows each: keys 0 to 11."""
    space = Space(tmp_path / "store", {"what": "these"})
    for number in range(3):
        space.write(keys_from(4 * number, 4), values(4, 5, seed=number))
    return space


def shard_of(space: Space, number: int) -> Path:
    return space.find(keys_from(4 * number, 1)).shards[0].path


@pytest.mark.parametrize("memory_budget", [UNLIMITED, 0], ids=["in memory", "from disk"])
@pytest.mark.parametrize("shape", [(7,), (3, 2, 4)], ids=["features", "maps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], memory_budget: int, tmp_path: Path
) -> None:
    space = Space(tmp_path, {})
    keys, written = keys_from(0, 9), values(9, *shape, dtype=dtype)
    written[0].view(-1)[0] = float("nan")
    space.write(keys[:4], written[:4])
    space.write(keys[4:], written[4:])
    order = torch.tensor([8, 0, 3, 3, 5])
    rows = Rows(Space(tmp_path, {}).find(keys), memory_budget, CPU)
    assert rows.in_memory == (memory_budget > 0) and len(rows) == 9
    assert rows[order].dtype == dtype
    assert torch.equal(rows[order].contiguous().view(torch.uint8), written[order].contiguous().view(torch.uint8))
    rows.close()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.binary(min_size=16, max_size=16), max_size=6), max_size=4),
    st.lists(st.binary(min_size=16, max_size=16), max_size=4),
)
def test_written_keys_are_found_and_others_are_missing(shards: list[list[bytes]], others: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        space = Space(Path(folder), {})
        written: dict[bytes, float] = {}
        for keys in shards:
            new = list(dict.fromkeys(keys))
            if new:
                space.write(as_keys(new), torch.tensor([[written.setdefault(k, float(len(written)))] for k in new]))
        requested = list(dict.fromkeys([*others, *written]))
        stored = [i for i, key in enumerate(requested) if key in written]
        for _ in range(2):  # without an index, and with one
            found = space.find(as_keys(requested))
            assert {requested[i] for i in found.missing} == set(requested) - set(written)
            if stored:
                rows = Rows(found, 0, CPU)
                assert rows[torch.tensor(stored)].squeeze(1).tolist() == [written[requested[i]] for i in stored]
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


def test_shard_without_permission_is_ignored_and_stays(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    space.refresh_index()
    closed, access = shard_of(space, 1), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    found, corrupt = space.find_intact(keys_from(0, 12))
    assert len(found.missing) and closed not in [shard.path for shard in found.shards]
    assert not corrupt and closed.exists()


def test_shard_that_is_removed_while_it_is_opened_is_skipped(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removed(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", removed)  # safetensors calls it after opening the file
    assert not len(space.find(keys_from(0, 12)).missing)
    space.compact(space.shards(), 2**20)
    assert len(space.shards()) == 1


CORRUPTIONS = {"truncated": _truncate, "empty": _empty, "garbage": _garbage, "longer": _grow}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_rows_of_a_corrupt_shard_are_missing_and_others_are_found(corruption: str, space: Space) -> None:
    bad = shard_of(space, 1)
    CORRUPTIONS[corruption](bad)
    found, corrupt = space.find_intact(keys_from(0, 12))
    assert found.missing.tolist() == [4, 5, 6, 7]
    assert corrupt == 1
    assert not bad.exists()
    assert torch.equal(read(space, keys_from(8, 4)), values(4, 5, seed=2))
    space.write(keys_from(4, 4), values(4, 5, seed=1))
    assert torch.equal(read(space, keys_from(4, 4)), values(4, 5, seed=1))


def test_any_flipped_bit_in_a_shard_is_detected(space: Space) -> None:
    bad = shard_of(space, 1)
    intact = bad.read_bytes()
    for at in range(len(intact)):
        bad.write_bytes(intact[:at] + bytes([intact[at] ^ (1 << at % 8)]) + intact[at + 1 :])
        found, _ = space.find_intact(keys_from(0, 12))
        assert found.missing.tolist() == [4, 5, 6, 7], f"byte {at}"
        assert not bad.exists()


def test_corrupt_shard_in_a_read_only_folder_is_not_used(space: Space, mount: Callable[..., None]) -> None:
    _truncate(shard_of(space, 1))
    mount("--bind", str(space.path), str(space.path))
    mount("-o", "remount,bind,ro", str(space.path))
    for _ in range(2):
        found, corrupt = space.find_intact(keys_from(0, 12))
        assert found.missing.tolist() == [4, 5, 6, 7] and corrupt == 1


@pytest.mark.parametrize("corruption", ["truncated", "garbage"])
def test_fit_recomputes_only_the_rows_of_a_corrupt_shard(
    corruption: str, rows: Callable[..., tuple[int, int]], album: Path
) -> None:
    (album / "train/red/0.png").rename("aside.png")
    assert rows("--data.root", "album") == (0, 35)
    Path("aside.png").rename(album / "train/red/0.png")
    assert rows("--data.root", "album") == (35, 1)
    small = min(Path("store").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    CORRUPTIONS[corruption](small)
    assert rows("--data.root", "album") == (35, 1)
    assert rows("--data.root", "album") == (36, 0)


@pytest.mark.parametrize("corruption", ["flipped bit", "truncated"])
def test_fit_reports_corrupt_files(
    corruption: str, fit: Callable[..., int], rows: Callable[..., tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows()
    (shard,) = Path("store").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content if corruption == "flipped bit" else content[:-1])
    assert fit(*STORED) == 0
    assert "1 corrupt cache files were discarded and recomputed" in capsys.readouterr().out


def test_least_recently_used_shards_are_evicted(tmp_path: Path) -> None:
    spaces = [Space(tmp_path, {"number": number}) for number in range(4)]
    for number, space in enumerate(spaces):
        space.write(keys_from(0, 4), values(4, 5))
        space.write(keys_from(4, 4), values(4, 5, seed=1))
        for shard, path in enumerate(sorted(space.path.glob("*.safetensors"))):
            os.utime(path, (1000, 1000 + 10 * number + shard))
    size = next(spaces[0].path.glob("*.safetensors")).stat().st_size
    spaces[1].find_intact(keys_from(0, 8))  # now the most recently used
    in_use = set(spaces[0].path.glob("*.safetensors"))
    assert evict_shards(tmp_path, 5 * size + 1, keep=in_use) == 3 * size
    remaining = [len(list(space.path.glob("*.safetensors"))) for space in spaces]
    assert remaining == [2, 2, 0, 1], "shards in use stay, although they are the oldest"
    assert evict_shards(tmp_path, 5 * size, keep=in_use) == 0


def test_fit_keeps_the_store_within_its_budget(rows: Callable[..., tuple[int, int]], here: Path) -> None:
    budget = ["--features.budget", f"{2.5 * 36 * FEATURES * 4 / 1e9:.9f}"]
    for size in ("32", "40", "48", "40"):
        rows("--model.image_size", size, *budget)
        size_on_disk = sum(path.stat().st_size for path in Path("store").rglob("*.safetensors"))
        assert size_on_disk <= 2.5 * 36 * FEATURES * 4
    assert rows(*budget) == (0, 36), "evicted when rows at 48 px were stored"
    assert rows("--model.image_size", "40", *budget) == (36, 0)


def test_unused_rows_in_the_current_space_are_evicted(rows: Callable[..., tuple[int, int]], album: Path) -> None:
    most = int(1.5 * 36 * FEATURES * 4)
    for number in range(3):
        for at, path in enumerate(sorted(album.rglob("*.png"))):
            draw(path, (9, 9, 9), 1000 * number + at)
        rows("--data.root", "album", "--features.budget", f"{most / 1e9:.9f}")
    assert sum(path.stat().st_size for path in Path("store").rglob("*.safetensors")) <= most


def test_nothing_is_evicted_within_the_budget(rows: Callable[..., tuple[int, int]], album: Path) -> None:
    budget = ["--data.root", "album", "--features.budget", f"{2.8 * 36 * FEATURES * 4 / 1e9:.9f}"]
    assert rows("--model.image_size", "40", *budget) == (0, 36)
    assert rows(*budget) == (0, 36)
    draw(album / "train/red/new.png", (200, 0, 0), 99)
    assert rows(*budget) == (36, 1)
    (album / "train/red/new.png").unlink()
    assert rows("--model.image_size", "40", *budget) == (36, 0)


@pytest.mark.parametrize("memory_budget", [UNLIMITED, 0], ids=["in memory", "from disk"])
def test_rows_merged_by_another_fit_after_lookup_are_located_again(space: Space, memory_budget: int) -> None:
    keys = keys_from(0, 12)
    found = space.find(keys)
    space.compact(space.shards(), 2**20)
    assert len(space.shards()) == 1, "the shards that were found no longer exist"
    rows = open_rows(space, keys, found, memory_budget, CPU)
    assert torch.equal(rows[torch.arange(12)], torch.cat([values(4, 5, seed=number) for number in range(3)]))
    rows.close()


def test_rows_evicted_by_another_fit_after_lookup_are_reported(space: Space) -> None:
    keys = keys_from(0, 12)
    found = space.find(keys)
    shard_of(space, 1).unlink()
    with pytest.raises(StoreError, match="was removed by another fit"):
        open_rows(space, keys, found, UNLIMITED, CPU)


def test_dangling_link_is_reported_instead_of_retried_forever(space: Space) -> None:
    space.refresh_index()
    keys = keys_from(0, 12)
    found = space.find(keys)
    path = shard_of(space, 1)
    path.unlink()
    path.symlink_to("/nowhere/at/all")
    with pytest.raises(StoreError, match="was removed by another fit"):
        open_rows(space, keys, found, UNLIMITED, CPU)
