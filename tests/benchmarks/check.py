"""``check`` on many small images: the first time, and once everything is known.

    python -m tests.benchmarks.check --images 1000 10000

Images are generated. Seconds of the whole process are measured from outside; those of the check itself, which leave out
that torch and Lightning are imported, are what it prints.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.measure import Ran, process, progress, table

CLASSES = 10


def generate(root: Path, count: int, side: int) -> None:
    """Write images of blotches and noise, each unlike all others."""
    for number in range(count):
        random = np.random.default_rng(number)
        blotches = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype="uint8"))
        pixels = np.asarray(blotches.resize((side * 4 // 3, side), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + random.integers(-12, 12, pixels.shape, dtype=np.int16)).clip(0, 255).astype("uint8")
        path = root / ("val" if number % 5 == 0 else "train") / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def check(root: Path) -> tuple[Ran, float]:
    """Check a folder: the process, and the seconds that it says."""
    ran = process("project", "check", "--data.root", root, expected=(0, 1))
    (seconds,) = re.findall(r"classes in ([\d.]+) s\.", ran.output)
    return ran, float(seconds)


def main() -> None:
    """Print a table with a row for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--side", type=int, default=192, help="pixels of the shorter side")
    options = parser.parse_args()
    rows = []
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            root = Path(folder, "images")
            generate(root, count, options.side)
            (cold, first), (warm, second) = check(root), check(root)
            progress(f"{count}: {first:.1f} s, then {second:.2f} s")
            rows.append(
                [
                    *(str(count), f"{first:.1f}", f"{second:.1f}", f"{first / max(second, 0.05):.0f}"),
                    *(f"{cold.seconds:.1f}", f"{warm.seconds:.1f}", f"{cold.peak:.0f}", f"{warm.peak:.0f}"),
                ]
            )
    header = ["images", "s, first", "s, again", "times as fast", "process, s, first", "process, s, again"]
    table([*header, "peak memory first, MB", "peak memory again, MB"], rows)


if __name__ == "__main__":
    main()
