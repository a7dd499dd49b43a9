"""Validation accuracy of a linear probe on real photographs over several seeds, through the command line.

    python -m tests.benchmarks.accuracy --data DIR
    python -m tests.benchmarks.accuracy --data DIR --compare

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``. Each row is a set of complete ``fit`` runs that
train only the head on EfficientNet-Lite0 with ImageNet weights. The seeds of a row share a feature store that is empty
before the first. ``--compare`` runs three variants: stored features, features recomputed in every epoch, and stored
int8 features.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.benchmarks.measure import LITE0, print_table, progress, run_module, subset

OPTIMIZER = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001")
#: With a random head, as only fits on stored features would start with a solved one.
FLAGS = (*LITE0, *OPTIMIZER, "--model.head_init", "random", "--trainer.enable_progress_bar", "false")
VARIANTS = {
    "stored": (),
    "computed in every epoch": ("--features.cache", "off"),
    "stored, int8": ("--features.precision", "int8"),
}


@dataclass(frozen=True)
class FitResult:
    """Result of one fit.

    Attributes:
        best: Best validation accuracy.
        last: Validation accuracy after the last epoch.
        seconds: Wall time of the whole process.
    """

    best: float
    last: float
    seconds: float


def fit(root: Path, seed: int, epochs: int, store: Path, *flags: object) -> FitResult:
    """Train a head with one seed."""
    with tempfile.TemporaryDirectory() as runs:
        run = run_module(
            *("project", "fit", *FLAGS, "--data.root", root, "--seed_everything", seed),
            *("--trainer.max_epochs", epochs, "--features.folder", store, "--trainer.default_root_dir", runs),
            *("--name", "run", *flags),
            cache=store / "compiled",
        )
        events = EventAccumulator(str(Path(runs, "run", "version_0")))
        events.Reload()
        values = [event.value for event in events.Scalars("val/accuracy")]
    progress(f"{root.name} {' '.join(map(str, flags))} seed {seed}: {max(values):.4f}, {run.seconds:.1f} s")
    return FitResult(max(values), values[-1], run.seconds)


def fit_seeds(root: Path, seeds: int, epochs: int, store: Path, *flags: object) -> list[FitResult]:
    """Train a head with each of the seeds ``0 .. seeds - 1``."""
    return [fit(root, seed, epochs, store, *flags) for seed in range(seeds)]


def columns(results: Sequence[FitResult]) -> list[str]:
    """The cells under ``HEADER``."""
    best = [result.best for result in results]
    later_seconds = [result.seconds for result in results[1:]]
    return [
        f"{mean(best):.4f} ({' '.join(f'{value:.4f}' for value in best)})",
        f"{mean(result.last for result in results):.4f}",
        f"{results[0].seconds:.0f}",
        f"{mean(later_seconds):.0f}" if later_seconds else "",
    ]


HEADER = ["best val accuracy, mean (per seed)", "last epoch", "first fit, s", "later fits, mean s"]


def argument_parser(description: str | None, sets: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of a benchmark over data sets and seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=list(sets), help="names of the data sets")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, help="approximate number of images per data set; default: all")
    parser.add_argument("--size", type=int, help="input size in pixels; default: that of the weights")
    return parser


def main() -> None:
    """Print a table with one row per data set and variant."""
    parser = argument_parser(__doc__, ["hymenoptera", "flowers5", "clothing10"])
    parser.add_argument("--compare", action="store_true", help="compare stored, live and int8 features")
    options = parser.parse_args()
    variants = VARIANTS if options.compare else {"stored": VARIANTS["stored"]}
    size = ["--model.image_size", options.size] if options.size else []
    rows: list[list[str]] = []
    comparison: list[list[str]] = []
    for name in options.sets:
        results: dict[str, list[FitResult]] = {}
        for variant, flags in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                root = subset(options.data / name, options.images, Path(folder))
                store = Path(folder, "store")
                results[variant] = fit_seeds(root, options.seeds, options.epochs, store, *size, *flags)
            rows.append([name, variant, *columns(results[variant])])
        for seed in range(options.seeds):
            comparison.append([name, str(seed), *(f"{results[variant][seed].best:.4f}" for variant in variants)])
    print_table(["data set", "features", *HEADER], rows)
    if options.compare:
        print("\nBest val accuracy per seed:\n")
        print_table(["data set", "seed", *variants], comparison)


if __name__ == "__main__":
    main()
