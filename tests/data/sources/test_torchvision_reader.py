"""Downloads of torchvision data sets are locked per folder."""

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


def test_one_process_at_a_time_downloads_into_a_folder(tmp_path: Path) -> None:
    running, most_running = 0, 0

    class Slow(FakeData):
        def __init__(self, root: str, download: bool = False) -> None:
            nonlocal running, most_running
            running += 1
            most_running = max(most_running, running)
            time.sleep(0.05)
            running -= 1
            super().__init__(2, (3, 8, 8), 2)

    factory = functools.partial(Slow, root=str(tmp_path / "new"), download=True)
    with ThreadPoolExecutor(4) as pool:
        assert all("train" in splits for splits in pool.map(lambda _: open_splits(factory), range(4)))
    assert most_running == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EPERM])
def test_folder_without_locks_gives_a_warning(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", fail)
    factory = functools.partial(DownloadedData, root=str(tmp_path), download=True)
    with pytest.warns(UserWarning, match=r"cannot be locked \(.*one process at a time"):
        assert "train" in open_splits(factory)


def test_root_that_is_a_file_gives_no_lock_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"CIFAR10 cannot be downloaded: .*File exists"):
        open_splits(functools.partial(CIFAR10, root=str(tmp_path / "file"), download=True))
    assert not recwarn.list


class DownloadedData(FakeData):
    """A data set with an argument ``download`` that needs no download."""

    def __init__(self, root: str, download: bool = False) -> None:
        super().__init__(2, (3, 8, 8), 2)
