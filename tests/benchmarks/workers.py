"""Memory, open files and threads of the DataLoader workers, epoch by epoch.

    python -m tests.benchmarks.workers --data DIR/flowers5 --epochs 10 --workers 2

``DIR/flowers5`` contains ``{train,val}/CLASS/*.jpg``. Persistent workers read and augment the training images, as in a
fit. Memory is the proportional set size of this process and its workers, so that shared pages count once; mapped files
such as libraries are excluded. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import NamedTuple

from project.data.datamodule import ImageDataModule
from project.preprocessing import Preprocessing
from tests.benchmarks.measure import print_table

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class ResourceUsage(NamedTuple):
    """Resources of this process and its workers together."""

    megabytes: float
    open_files: int
    threads: int


def resource_usage() -> ResourceUsage:
    """Measure this process and its workers."""
    megabytes, open_files, threads = 0.0, 0, 0
    for pid in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
        folder = Path("/proc", pid)
        lines = (folder / "smaps_rollup").read_text().splitlines()
        megabytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
        open_files += len(list((folder / "fd").iterdir()))
        threads += len(list((folder / "task").iterdir()))
    return ResourceUsage(megabytes, open_files, threads)


def main() -> None:
    """Print a table with one row per epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data = ImageDataModule(root=str(options.data), augment="standard", num_workers=options.workers)
    data.preprocessing = PREPROCESSING
    loader = data.train_dataloader().images
    rows = []
    for epoch in range(options.epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        start = time.perf_counter()
        count = sum(len(labels) for _, labels, _ in loader)
        rate = count / (time.perf_counter() - start)
        usage = resource_usage()
        rows.append([str(epoch), f"{rate:.0f}", f"{usage.megabytes:.0f}", str(usage.open_files), str(usage.threads)])
    print_table(["epoch", "images/s", "MB, all processes", "open files", "threads"], rows)


if __name__ == "__main__":
    main()
