"""Long fits take no more memory, files or threads in their last epochs than in their first."""

from pathlib import Path

import pytest

from tests.benchmarks.soak import LIVE, watched
from tests.conftest import SMALL, STORED

#: Epochs: in each run of the tests, and in full.
STORED_EPOCHS = [40, pytest.param(200, marks=pytest.mark.long)]
LIVE_EPOCHS = [6, pytest.param(20, marks=pytest.mark.long)]


def check_flat(noted: list[tuple[float, float, int, int]], megabytes: float) -> None:
    settled = noted[len(noted) // 3]  # by then, what is made once is made
    last = noted[-1]
    assert last[2:] == settled[2:], "files and threads"
    assert last[1] - settled[1] < megabytes, [round(each[1]) for each in noted]


@pytest.mark.parametrize("epochs", STORED_EPOCHS)
def test_on_stored_rows(epochs: int, here: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, *STORED, "--model.weights", str(weights), "--data.root", str(photos), "--data.batch_size", "4"]
    check_flat(watched(epochs, *flags), 10)


@pytest.mark.parametrize("epochs", LIVE_EPOCHS)
def test_on_live_images(epochs: int, here: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.accelerator", "cpu"]
    check_flat(watched(epochs, *flags, *LIVE), 20)
