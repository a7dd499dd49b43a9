"""How often a fit opens each image: to know what it is, to compute its row, and never without need."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from project.data.datamodule import ImageDataModule
from tests.conftest import STORED, draw, told

Fit = Callable[..., int]
#: The dashboard reads the images that it shows.
FLAGS = [*STORED, "--trainer.logger", "false", "--data.root"]

_counts: list[Counter[str]] = []


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counts and isinstance(arguments[0], str) and arguments[0].endswith(".png"):
        _counts[-1][os.path.realpath(arguments[0])] += 1


sys.addaudithook(_count)


@pytest.fixture
def opens(fit: Fit, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a fit; gives how often it has opened each image of a folder, and which rows it has reused and computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))

    def run(folder: str, *flags: str) -> tuple[set[int], tuple[int, int]]:
        capsys.readouterr()
        _counts.append(Counter())
        try:
            assert fit(*FLAGS, folder, *flags) == 0
        finally:
            counts = _counts.pop()
        images = [os.path.realpath(path) for path in Path(folder).rglob("*.png") if "test" not in path.parts]
        (rows,) = told(capsys.readouterr().out)
        return {counts[path] for path in images}, rows

    yield run


def test_a_first_fit_reads_an_image_to_index_it_and_to_compute_its_row(opens: Any, album: Path) -> None:
    assert opens("album/train") == ({2}, (0, 24)), "images are held out, by what they look like"
    assert opens("album/train") == ({0}, (24, 0)), "its row is stored"
    assert opens("album/train", "--model.image_size", "40") == ({1}, (0, 24)), "the index knows it, the store does not"


def test_so_does_one_on_data_with_splits_of_its_own(opens: Any, album: Path) -> None:
    assert opens("album") == ({2}, (0, 36))
    assert opens("album") == ({0}, (36, 0))
    assert opens("album", "--model.image_size", "40") == ({1}, (0, 36))


def test_what_a_check_has_read_is_read_once_by_a_fit(opens: Any, album: Path) -> None:
    data = ImageDataModule(str(album))
    assert data.source is not None
    data.facts([sample for split in data.source.splits.values() for sample in split])
    assert opens("album") == ({1}, (0, 36))


def test_views_are_made_of_images_that_are_read_once_for_each(opens: Any, album: Path) -> None:
    flags = ["--data.augment", "flip", "--features.views", "3"]
    opens("album")
    assert opens("album", *flags) == ({0, 2}, (36, 48))


def test_an_image_that_is_changed_in_place_is_read_again(opens: Any, album: Path) -> None:
    opens("album")
    draw(album / "val/red/0.png", (200, 0, 0), 1000)
    assert opens("album") == ({0, 2}, (35, 1))
