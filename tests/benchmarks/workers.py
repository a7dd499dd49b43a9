"""Memory, open files and threads of the processes that read images, epoch by epoch.

    python -m tests.benchmarks.workers --data DIR/flowers5 --epochs 10 --workers 2

``DIR/flowers5`` holds ``{train,val}/CLASS/*.jpg``. The training images are read and augmented by workers that live on
from epoch to epoch, as in a fit. Memory is what this process and its workers have of their own, with what they share
counted once; files that are mapped, such as libraries, are left out, as other programs share them. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

from project.data.datamodule import ImageDataModule
from project.preprocessing import Preprocessing
from tests.benchmarks.measure import table

PREPROCESSING = Preprocessing(256, 224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def taken() -> tuple[float, int, int]:
    """Megabytes, open files and threads of this process and its workers."""
    megabytes, files, threads = 0.0, 0, 0
    for pid in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
        place = Path("/proc", pid)
        lines = (place / "smaps_rollup").read_text().splitlines()
        megabytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
        files += len(list((place / "fd").iterdir()))
        threads += len(list((place / "task").iterdir()))
    return megabytes, files, threads


def main() -> None:
    """Print a table with a row for each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data = ImageDataModule(root=str(options.data), augment="standard", num_workers=options.workers)
    data.preprocessing = PREPROCESSING
    loader = data.train_dataloader().images
    rows = []
    for epoch in range(options.epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        began = time.perf_counter()
        count = sum(len(labels) for _, labels, _ in loader)
        seconds = time.perf_counter() - began
        megabytes, files, threads = taken()
        rows.append([str(epoch), f"{count / seconds:.0f}", f"{megabytes:.0f}", str(files), str(threads)])
    table(["epoch", "images/s", "MB, all processes", "open files", "threads"], rows)


if __name__ == "__main__":
    main()
