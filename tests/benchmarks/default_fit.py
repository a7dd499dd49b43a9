"""Compare ``fit`` with no options but the backbone with other ways to train a head on the same features.

    python -m tests.benchmarks.default_fit --data DIR

The others are the recipe of ``configs/article.yaml``, AdamW for 20 epochs from random weights, and scikit-learn's
``LogisticRegressionCV`` on the same rows, standardized, with the same folds and penalties. Accuracies on the validation
images: of the solved head (epoch 0) and of the last epoch, which these images do not choose, and of the best epoch,
which they do.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from tests.benchmarks.data_sets import ALL, data_sets
from tests.benchmarks.head_solver import compare, features
from tests.benchmarks.measure import LITE0, ROOT, print_table, progress, run_module

FITS: dict[str, tuple[object, ...]] = {
    "fit": LITE0,
    "article.yaml": ("-c", ROOT / "configs/article.yaml", *LITE0),
    "AdamW, 20 epochs": (
        *(*LITE0, "--model.head_init", "random", "--trainer.max_epochs", 20),
        *("--model.optimizer", "AdamW", "--model.optimizer.lr", 0.001),
    ),
}


def accuracies(folder: Path, flags: tuple[object, ...]) -> list[float]:
    """Validation accuracy of each validation of a fit."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_module("project", "fit", *flags, "--trainer.default_root_dir", folder, "--dashboard.figures", "false")
    (version,) = folder.glob("*/version_0")
    events = EventAccumulator(str(version))
    events.Reload()
    return [event.value for event in events.Scalars("val/accuracy")]


def described(accuracy: float, count: int) -> str:
    """An accuracy with its 95 % interval and the number of images."""
    from project.evaluation.confidence_intervals import wilson

    low, high = wilson(round(accuracy * count), count)
    return f"{accuracy:.3f} ({low:.3f} to {high:.3f}, n = {count})"


def main() -> None:
    """Print one row per data set and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    table = []

    def add(*cells: str) -> None:
        table.append(list(cells))
        progress(" | ".join(cells))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, root, size in data_sets(options.data, options.sets, folder):
            count = sum(1 for _ in (root / "val").glob("*/*"))
            common = ("--data.root", root, "--model.image_size", size, "--features.folder", folder / "store")
            for way, flags in FITS.items():
                values = accuracies(folder / f"{way} on {name}", (*flags, *common))
                initial = f"{values[0]:.3f}" if way == "fit" else ""
                add(name, way, initial, described(values[-1], count), f"{max(values):.3f}")
            accuracy = compare(*features(root, size, folder / "store")).standardized.accuracy
            add(name, "scikit-learn", "", described(accuracy, count), "")
    print_table(["data set", "way", "epoch 0", "last epoch", "best epoch"], table)


if __name__ == "__main__":
    main()
