"""Time and memory of ``check`` on many small generated images, with an empty and with a full index.

    python -m tests.benchmarks.check --images 1000 10000

The seconds of the whole process are measured from outside. The seconds of the check itself are the ones that it prints;
they exclude the import of torch and Lightning.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.measure import CompletedRun, print_table, progress, run_module

CLASSES = 10


def generate(root: Path, count: int, side: int) -> None:
    """Write distinct images of coloured patches and noise."""
    for number in range(count):
        random = np.random.default_rng(number)
        patches = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype="uint8"))
        pixels = np.asarray(patches.resize((side * 4 // 3, side), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + random.integers(-12, 12, pixels.shape, dtype=np.int16)).clip(0, 255).astype("uint8")
        path = root / ("val" if number % 5 == 0 else "train") / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def check(root: Path) -> tuple[CompletedRun, float]:
    """Check a folder; return the process and the seconds that it reports."""
    run = run_module("project", "check", "--data.root", root, expected=(0, 1))
    (seconds,) = re.findall(r"class(?:es)? in ([\d.]+) s\.", run.output)
    return run, float(seconds)


def main() -> None:
    """Print a table with one row per number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000], help="numbers of images")
    parser.add_argument("--side", type=int, default=192, help="pixels of the shorter side")
    options = parser.parse_args()
    rows = []
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            root = Path(folder, "images")
            generate(root, count, options.side)
            cold, cold_seconds = check(root)
            warm, warm_seconds = check(root)
            progress(f"{count}: {cold_seconds:.1f} s cold, {warm_seconds:.2f} s warm")
            speedup = cold_seconds / max(warm_seconds, 0.05)
            rows.append(
                [
                    *(str(count), f"{cold_seconds:.1f}", f"{warm_seconds:.1f}", f"{speedup:.0f}"),
                    *(f"{cold.seconds:.1f}", f"{warm.seconds:.1f}", f"{cold.peak:.0f}", f"{warm.peak:.0f}"),
                ]
            )
    header = ["images", "cold, s", "warm, s", "speedup", "process cold, s", "process warm, s"]
    print_table([*header, "peak memory cold, MB", "peak memory warm, MB"], rows)


if __name__ == "__main__":
    main()
