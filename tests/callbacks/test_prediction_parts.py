"""Parts of a table: which images are pending, whose run they are of, and that all are merged."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from project.callbacks.prediction_columns import PATH
from project.callbacks.prediction_formats import FORMATS
from project.callbacks.prediction_parts import Part, PartFolder
from project.errors import ConfigError, DataError

RUN = {"checkpoint": ["1"], "images": [10, "abc"]}


def part_folder(folder: Path) -> PartFolder:
    return PartFolder(folder / "p.csv", FORMATS[".csv"], [PATH])


def write(folder: PartFolder, begin: int, end: int) -> None:
    folder.write(Part(begin, end, 0), [[f"{number}.png"] for number in range(begin, end)], None)


def test_a_later_run_computes_what_is_pending_and_merges_all_in_order(tmp_path: Path) -> None:
    first = part_folder(tmp_path)
    first.open(RUN)
    write(first, 4, 7)
    write(first, 0, 2)
    (first.path / ".writing-0.csv").write_text("of a killed process")
    first.close()
    second = part_folder(tmp_path)
    second.open(RUN)
    assert not (first.path / ".writing-0.csv").exists()
    assert second.pending(10).tolist() == [2, 3, 7, 8, 9]
    with pytest.raises(DataError, match=r"images 2 to 3 are missing from .*p\.csv\.parts"):
        second.merge(10)
    write(second, 2, 4)
    with pytest.raises(DataError, match="images 7 to 9 are missing"):
        second.merge(10)
    write(second, 7, 10)
    assert second.merge(10) == 0
    assert (tmp_path / "p.csv").read_text().split() == ["path", *(f"{number}.png" for number in range(10))]
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_parts_of_another_command_are_refused_and_kept(tmp_path: Path) -> None:
    first = part_folder(tmp_path)
    first.open(RUN)
    write(first, 0, 2)
    first.close()
    other = part_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"predictions of an interrupted command with other checkpoint\.") as error:
        other.open({**RUN, "checkpoint": ["2"]})
    assert len(str(error.value).splitlines()) == 2
    assert other.parts() == [Part(0, 2, 0)]
    first.open(RUN)  # is not locked
    first.close()


def test_a_folder_without_parts_is_of_no_command(tmp_path: Path) -> None:
    folder = part_folder(tmp_path)
    folder.open(RUN)
    folder.engines = ["torch fp32"]
    folder.close()
    assert not folder.path.exists()
    folder.open(RUN)
    folder.engines = ["torch fp32"]
    other = part_folder(tmp_path)
    with pytest.raises(ConfigError, match="another process is writing"):
        other.open(RUN)
    folder._lock.release()  # as if the process was killed
    other.open({**RUN, "checkpoint": ["2"]})
    assert other.engines is None
    other.close()


def test_parts_that_overlap_are_merged_once(tmp_path: Path) -> None:
    folder = part_folder(tmp_path)
    folder.open(RUN)
    for begin, end in ((0, 4), (4, 6), (4, 8), (6, 9)):  # the second and the last one by a rank of a killed run
        write(folder, begin, end)
    assert folder.pending(10).tolist() == [8, 9]
    write(folder, 8, 10)
    folder.merge(10)
    assert (tmp_path / "p.csv").read_text().split() == ["path", *(f"{number}.png" for number in range(10))]


def test_killed_removal_of_the_folder_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    unlink, left = os.unlink, 0

    def unlink_some(path: Any, **options: Any) -> None:
        nonlocal left
        if ".writing-" not in str(path):
            left -= 1
            if left < 0:
                raise Killed
        unlink(path, **options)

    for count in range(5):
        folder = part_folder(tmp_path)
        folder.open(RUN)
        for number in range(5):
            write(folder, 2 * number, 2 * number + 2)
        left = count
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "unlink", unlink_some)
            folder.merge(10)
        folder._lock.release(force=True)  # as if the process was killed
        again = part_folder(tmp_path)
        again.open(RUN)
        assert len(again.pending(10)) == 2 * count
        again.close()
        shutil.rmtree(folder.path)


def test_rank_of_a_killed_run_does_not_create_the_folder_anew(tmp_path: Path) -> None:
    rank = part_folder(tmp_path)
    other = part_folder(tmp_path)
    other.open(RUN)
    write(other, 0, 10)
    other.merge(10)
    with pytest.raises(FileNotFoundError):
        write(rank, 4, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
