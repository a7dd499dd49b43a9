"""Soak test: memory, open files and threads do not grow during a long fit."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.soak import LIVE, MONITOR, parse_usage
from tests.conftest import SMALL, STORED
from tests.forked import start

CheckUsage = Callable[..., None]


@pytest.fixture
def check_usage(here: Path, photos: Path, weights: Path) -> CheckUsage:
    """Runs a fit in a subprocess; checks that resource usage does not grow after the first third of the epochs."""

    def check(epochs: int, megabytes: int, *flags: str) -> None:
        flags = (*SMALL, "--model.weights", str(weights), "--data.root", str(photos), *MONITOR, *flags)
        plain = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
        run = start(here, ["fit", *flags, *plain, "--data.batch_size", "4", "--trainer.max_epochs", str(epochs)])
        assert run.wait(300) == 0, run.output
        usage = parse_usage(run.output)
        assert len(usage) == epochs
        settled, last = usage[epochs // 3], usage[-1]
        assert (last.open_files, last.threads) == (settled.open_files, settled.threads)
        assert last.megabytes - settled.megabytes < megabytes, [epoch.megabytes for epoch in usage]

    return check


@pytest.mark.parametrize("epochs", [60, pytest.param(200, marks=pytest.mark.long)])
def test_epochs_on_stored_rows(epochs: int, check_usage: CheckUsage) -> None:
    check_usage(epochs, 10, *STORED)


def test_12_epochs_on_live_images(check_usage: CheckUsage) -> None:
    check_usage(12, 20, *LIVE)
