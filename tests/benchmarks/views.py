"""Accuracy and time of stored augmented views, by the number of views per training image.

    python -m tests.benchmarks.views --data DIR --sets clothing10 flowers5 --seeds 3 --epochs 20

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``. Each row is one complete ``fit`` per seed, as
in ``accuracy``. All rows of a data set share one feature store: a fit with four views reuses the two views of an
earlier one, and only the first seed of a row computes any. The live rows augment anew in every epoch, which is slow:
they can use fewer seeds and epochs, or be left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.benchmarks.accuracy import HEADER, argument_parser, columns, fit_seeds
from tests.benchmarks.measure import print_table, subset

STANDARD = ("--data.augment", "standard")


def main() -> None:
    """Print a table with one row per data set and number of views."""
    parser = argument_parser(__doc__, ["clothing10", "flowers5"])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of stored views")
    parser.add_argument("--no-live", action="store_true", help="leave out live augmentation")
    parser.add_argument("--live-epochs", type=int, help="epochs of the live fits; default: --epochs")
    parser.add_argument("--live-seeds", type=int, help="seeds of the live fits; default: --seeds")
    options = parser.parse_args()
    size = ["--model.image_size", options.size] if options.size else []
    rows: list[list[str]] = []
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            root, store = subset(options.data / name, options.images, Path(folder)), Path(folder, "store")
            seeds, epochs = options.seeds, options.epochs
            plain = fit_seeds(root, seeds, epochs, store, *size)
            rows.append([name, "none", "1", str(epochs), *columns(plain)])
            for views in options.views:
                stored = fit_seeds(root, seeds, epochs, store, *size, *STANDARD, "--features.views", views)
                rows.append([name, "standard, stored", str(views), str(epochs), *columns(stored)])
            if not options.no_live:
                seeds, epochs = options.live_seeds or seeds, options.live_epochs or epochs
                live = fit_seeds(root, seeds, epochs, store, *size, *STANDARD, "--features.cache", "off")
                rows.append([name, "standard, live", "one per epoch", str(epochs), *columns(live)])
    print_table(["data set", "augmentation", "views", "epochs", *HEADER], rows)


if __name__ == "__main__":
    main()
