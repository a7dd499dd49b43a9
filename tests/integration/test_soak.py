"""Long fits take no more memory, files or threads in their last epochs than in their first."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.soak import LIVE, WATCH, read
from tests.conftest import SMALL, STORED
from tests.forked import start

Check = Callable[..., None]


@pytest.fixture
def check_flat(here: Path, photos: Path, weights: Path) -> Check:
    """Runs a fit in a process of its own, and compares its end with what it was once all was made that is made once."""

    def check(epochs: int, megabytes: int, *flags: str) -> None:
        flags = (*SMALL, "--model.weights", str(weights), "--data.root", str(photos), *WATCH, *flags)
        quiet = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
        run = start(here, ["fit", *flags, *quiet, "--data.batch_size", "4", "--trainer.max_epochs", str(epochs)])
        assert run.wait(300) == 0, run.said
        noted = read(run.said)
        assert len(noted) == epochs
        settled, last = noted[epochs // 3], noted[-1]
        assert last[2:] == settled[2:], "files and threads"
        assert last[1] - settled[1] < megabytes, [each[1] for each in noted]

    return check


def test_over_200_epochs_on_stored_rows(check_flat: Check) -> None:
    check_flat(200, 10, *STORED)


def test_over_20_epochs_on_live_images(check_flat: Check) -> None:
    check_flat(20, 20, *LIVE)
