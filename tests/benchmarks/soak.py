"""Memory, open files and threads of a long fit, epoch by epoch, on stored rows and on live images.

    python -m tests.benchmarks.soak --data DIR/flowers5

By default 200 epochs on stored rows, and 20 epochs on images that two workers read and augment, with
EfficientNet-Lite0 at 112 px. Memory is measured as in ``workers``. Linux only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl

from tests.benchmarks.measure import LITE0, print_table, run_fit
from tests.benchmarks.workers import resource_usage

LIVE = ("--features.cache", "off", "--data.augment", "standard", "--data.num_workers", "2")
#: Flags that add the callback below to a fit.
MONITOR = ("--allow_imports", "tests", "--trainer.callbacks+=tests.benchmarks.soak.ResourceMonitor")


class EpochUsage(NamedTuple):
    """Resources at the end of an epoch, and the seconds since training began."""

    seconds: float
    megabytes: int
    open_files: int
    threads: int


class ResourceMonitor(pl.Callback):
    """Prints the resource usage at the end of each epoch."""

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Print the line that ``parse_usage`` reads."""
        usage, seconds = resource_usage(), time.perf_counter() - self._start
        counts = f"{usage.megabytes:.0f} MB, {usage.open_files} files, {usage.threads} threads"
        print(f"\nusage after {seconds:.1f} s: {counts}", flush=True)


def parse_usage(output: str) -> list[EpochUsage]:
    """Resource usage of each epoch, from the output of a fit with a ``ResourceMonitor``."""
    matches = re.findall(r"usage after ([\d.]+) s: (\d+) MB, (\d+) files, (\d+) threads", output)
    return [EpochUsage(float(seconds), *map(int, counts)) for seconds, *counts in matches]


def main() -> None:
    """Print a table for each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--stored", type=int, default=200, help="epochs on stored rows; 0 for none")
    parser.add_argument("--live", type=int, default=20, help="epochs on live images; 0 for none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        common = (*LITE0, "--model.image_size", "112", *MONITOR)
        for name, epochs, flags in (("stored rows", options.stored, ()), ("live images", options.live, LIVE)):
            if not epochs:
                continue
            run = run_fit(options.data, Path(store), *common, *flags, "--trainer.max_epochs", epochs)
            usage = parse_usage(run.output)
            shown = sorted({*(n for n in (1, 2, 5, 10, 20, 50, 100, 150, 200) if n <= epochs), epochs})
            print(f"\n{name}, {epochs} epochs")
            header = ["epoch", "seconds", "MB, all processes", "open files", "threads"]
            print_table(header, [[f"{value:.0f}" for value in (n, *usage[n - 1])] for n in shown])


if __name__ == "__main__":
    main()
