"""What stored augmented views are worth: accuracy and time by the number of views of each training image.

    python -m tests.benchmarks.views --data DIR --sets clothing10 flowers5 --seeds 3 --epochs 20

``DIR`` holds folders such as ``flowers5/{train,val}/CLASS/*.jpg``. Every row is a whole ``fit`` for each seed, as in
``accuracy``. All rows of a set share one store: a fit with four views has the two that an earlier one computed, and
only the first seed of a row computes any. The live rows compute new views in every epoch, which is slow: they can have
fewer seeds and epochs, or be left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.benchmarks.accuracy import HEADER, arguments, columns, fits
from tests.benchmarks.measure import some, table

STANDARD = ("--data.augment", "standard")


def main() -> None:
    """Print a table with a row for each number of views of each set."""
    parser = arguments(__doc__, ["clothing10", "flowers5"])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--no-live", action="store_true", help="leave out augmentation that is drawn in every epoch")
    parser.add_argument("--live-epochs", type=int, help="epochs of the live fits; by default as many")
    parser.add_argument("--live-seeds", type=int, help="seeds of the live fits; by default as many")
    options = parser.parse_args()
    size = ["--model.image_size", options.size] if options.size else []
    rows: list[list[str]] = []
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            root, store = some(options.data / name, options.images, Path(folder)), Path(folder, "store")
            seeds, epochs = options.seeds, options.epochs
            plain = fits(root, seeds, epochs, store, *size)
            rows.append([name, "none", "1", str(epochs), *columns(plain)])
            for views in options.views:
                stored = fits(root, seeds, epochs, store, *size, *STANDARD, "--features.views", views)
                rows.append([name, "standard, stored", str(views), str(epochs), *columns(stored)])
            if not options.no_live:
                seeds, epochs = options.live_seeds or seeds, options.live_epochs or epochs
                live = fits(root, seeds, epochs, store, *size, *STANDARD, "--features.cache", "off")
                rows.append([name, "standard, live", "one an epoch", str(epochs), *columns(live)])
    table(["photographs", "augmentation", "views", "epochs", *HEADER], rows)


if __name__ == "__main__":
    main()
