"""A fit opens each image at most twice: to index it, and to compute its row."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from project.data.datamodule import ImageDataModule
from tests.conftest import STORED, draw, row_counts

Fit = Callable[..., int]
#: Without the dashboard, which reads the images that it shows.
FLAGS = [*STORED, "--trainer.logger", "false", "--data.root"]

_counts: list[Counter[str]] = []  # one element while a fit is watched


def _count_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counts and isinstance(arguments[0], str) and arguments[0].endswith(".png"):
        _counts[-1][os.path.realpath(arguments[0])] += 1


sys.addaudithook(_count_opens)


@pytest.fixture
def opens(
    fit: Fit, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a fit; returns the set of open counts of its images, and the number of rows reused and computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))

    def run(folder: str, *flags: str) -> tuple[set[int], tuple[int, int]]:
        capsys.readouterr()
        _counts.append(Counter())
        try:
            assert fit(*FLAGS, folder, *flags) == 0
        finally:
            counts = _counts.pop()
        images = [os.path.realpath(path) for path in Path(folder).rglob("*.png") if "test" not in path.parts]
        (rows,) = row_counts(capsys.readouterr().out)
        return {counts[path] for path in images}, rows

    return run


def test_first_fit_opens_an_image_to_index_it_and_to_compute_its_row(opens: Any, album: Path) -> None:
    assert opens("album/train") == ({2}, (0, 24)), "the split needs the image index"
    assert opens("album/train") == ({0}, (24, 0)), "all rows are stored"
    assert opens("album/train", "--model.image_size", "40") == ({1}, (0, 24)), "indexed, but not stored at this size"


def test_first_fit_with_predefined_splits_opens_images_as_often(opens: Any, album: Path) -> None:
    assert opens("album") == ({2}, (0, 36))
    assert opens("album") == ({0}, (36, 0))
    assert opens("album", "--model.image_size", "40") == ({1}, (0, 36))


def test_fit_after_a_check_opens_each_image_once(opens: Any, album: Path) -> None:
    data = ImageDataModule(str(album))
    assert data.source is not None
    data.image_infos([sample for split in data.source.splits.values() for sample in split])
    assert opens("album") == ({1}, (0, 36))


def test_each_new_view_opens_the_image_once(opens: Any, album: Path) -> None:
    flags = ["--data.augment", "flip", "--features.views", "3"]
    opens("album")
    assert opens("album", *flags) == ({0, 2}, (36, 48))


def test_image_changed_in_place_is_opened_again(opens: Any, album: Path) -> None:
    opens("album")
    draw(album / "val/red/0.png", (200, 0, 0), 1000)
    assert opens("album") == ({0, 2}, (35, 1))
