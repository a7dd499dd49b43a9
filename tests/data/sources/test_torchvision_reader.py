"""torchvision's data sets are opened by one process at a time where they are downloaded."""

import errno
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, FakeData

from project.data.sources.torchvision_reader import open_splits
from project.errors import DataError


def test_one_at_a_time_downloads_into_a_folder(tmp_path: Path) -> None:
    inside, most = 0, 0

    class Slow(FakeData):
        def __init__(self, root: str, download: bool = False) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1
            super().__init__(2, (3, 8, 8), 2)

    opened = functools.partial(Slow, root=str(tmp_path / "new"), download=True)
    with ThreadPoolExecutor(4) as pool:
        assert all("train" in splits for splits in pool.map(lambda _: open_splits(opened), range(4)))
    assert most == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EPERM])
def test_a_folder_that_cannot_be_locked_is_told(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    opened = functools.partial(Quick, root=str(tmp_path), download=True)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*one process at a time"):
        assert "train" in open_splits(opened)


def test_a_root_that_is_no_folder_is_no_matter_of_locks(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"CIFAR10 cannot be downloaded: .*File exists"):
        open_splits(functools.partial(CIFAR10, root=str(tmp_path / "file"), download=True))
    assert not recwarn.list


class Quick(FakeData):
    """A data set that is there at once."""

    def __init__(self, root: str, download: bool = False) -> None:
        super().__init__(2, (3, 8, 8), 2)
