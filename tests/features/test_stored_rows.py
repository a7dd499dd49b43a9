"""Rows of images are found by the content of the images, in all spaces or not at all."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from project.features import shard
from project.features.store import Space, as_keys, row_key
from project.features.stored_rows import StoredRows

VIEWS = ("a transform", "another one")


def store(space: Space, view: str, rows: dict[bytes, float]) -> None:
    keys = as_keys([row_key(hashlib.sha256(content).digest(), view) for content in rows])
    space.write(keys, torch.tensor([*rows.values()])[:, None].expand(-1, 3).contiguous())


@pytest.fixture
def spaces(tmp_path: Path) -> list[tuple[Space, str]]:
    spaces = [(Space(tmp_path, {"engine": number}), view) for number, view in enumerate(VIEWS)]
    store(*spaces[0], {b"a": 1.0, b"b": 2.0})
    store(*spaces[0], {b"c": 3.0})
    store(*spaces[1], {b"b": 20.0, b"c": 30.0, b"d": 40.0})
    return spaces


def test_images_are_found_in_their_order(spaces: list[tuple[Space, str]]) -> None:
    positions, rows = StoredRows(spaces)([b"d", b"c", b"b", b"a", b"c"])
    assert positions == [1, 2, 4]  # c twice; a and d are in one space only
    assert [part[:, 0].tolist() for part in rows] == [[3, 2, 3], [30, 20, 30]]
    assert StoredRows(spaces[:1])([b"a"]).positions == [0]


def test_views_of_another_transform_are_not_found(spaces: list[tuple[Space, str]]) -> None:
    assert StoredRows([(spaces[0][0], VIEWS[1])])([b"a", b"b"]).positions == []


def test_rows_of_a_corrupt_shard_are_not_found(spaces: list[tuple[Space, str]]) -> None:
    space, _ = spaces[0]
    (shard,) = [
        path
        for path in space.shards()
        if len(np.fromfile(path, np.uint8)) == min(p.stat().st_size for p in space.shards())
    ]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert StoredRows(spaces[:1])([b"a", b"b", b"c"]).positions == [0, 1]


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_a_corrupt_shard_in_a_read_only_folder_are_not_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two builders have stored the same row, and one of the shards is corrupt."""
    space = Space(tmp_path, {})
    store(space, VIEWS[0], {b"a": 1.0, b"b": 2.0})
    store(space, VIEWS[0], {b"b": 2.0, b"c": 3.0})
    path = space.shards()[number]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    content[-13] ^= 1  # in both rows
    path.write_bytes(content)

    def read_only(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "rename", read_only)
    stored = StoredRows([(space, VIEWS[0])])
    for _ in range(2):
        positions, (rows,) = stored([b"b"])
        assert positions == [0] and rows.tolist() == [[2.0] * 3]


def test_shards_are_read_once_although_other_processes_mark_them_as_used(
    spaces: list[tuple[Space, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = shard.file_sha256
    monkeypatch.setattr(shard, "file_sha256", lambda path: (hashed.append(path), original(path))[1])
    stored = StoredRows(spaces[:1])
    for _ in range(3):
        assert stored([b"a", b"c"]).positions == [0, 1]
        for path in spaces[0][0].shards():
            os.utime(path)
    assert len(hashed) == 2


def test_rows_that_cannot_be_read_are_not_found(spaces: list[tuple[Space, str]]) -> None:
    space, _ = spaces[0]
    for number in range(2):
        if number:
            space.refresh_index()
        for path in space.shards():  # a folder: as root, any file can be read
            path.rename(path.with_suffix(".moved"))
            path.mkdir()
        assert StoredRows(spaces[:1])([b"a", b"c"]).positions == []
        for path in space.shards():
            path.rmdir()
            path.with_suffix(".moved").rename(path)


def test_removed_rows_are_not_found(spaces: list[tuple[Space, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process evicts them between the look-up and the reading."""
    find_intact = Space.find_intact

    def evicted(space: Space, *arguments: Any) -> object:
        result = find_intact(space, *arguments)
        for path in space.shards():
            path.unlink()
        return result

    monkeypatch.setattr(Space, "find_intact", evicted)
    assert StoredRows(spaces[:1])([b"a"]).positions == []


def test_space_without_rows_makes_it_empty(spaces: list[tuple[Space, str]], tmp_path: Path) -> None:
    assert not StoredRows(spaces).is_empty
    assert StoredRows([*spaces, (Space(tmp_path, {"engine": "new"}), "")]).is_empty
