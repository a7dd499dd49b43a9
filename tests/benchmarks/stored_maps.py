"""Partial fine-tuning from stored feature maps against the same fit without them: seconds per epoch, and losses.

    python -m tests.benchmarks.stored_maps --data DIR/flowers5

``DIR/flowers5`` contains ``{train,val}/CLASS/*.jpg``. Both fits train the last stage of a ResNet50 of random weights,
which take the same time as pretrained ones, on the same images without augmentation. They alternate. An epoch includes
its validation. The first epoch is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import print_table, progress, run_module, subset

CACHES = ("on", "off")


def measure(cache: str, data: Path, folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each epoch after the first, and the training loss of each epoch.

    Args:
        cache: ``features.cache``.
        data: Folder of the images.
        folder: Folder for runs and stored features.
        options: Parsed flags.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory(dir=folder) as runs:
        run_module(
            *("project", "fit", "--model.backbone", options.network, "--model.weights", "null"),
            # Random weights need the statistics of each batch, and a random head: their features are large.
            *("--model.trainable", options.trainable, "--model.batch_norm", "train", "--model.head_init", "random"),
            *("--model.image_size", options.size, "--data.root", data, "--trainer.max_epochs", options.epochs),
            *("--features.cache", cache, "--features.folder", folder / "store", "--trainer.default_root_dir", runs),
            *("--trainer.enable_progress_bar", "false"),
            cache=folder / "compiled",
        )
        (version,) = Path(runs).glob("*/version_0")
        events = EventAccumulator(str(version))
        events.Reload()
        epochs = events.Scalars("train/loss")
    return [after.wall_time - before.wall_time for before, after in itertools.pairwise(epochs)], [
        event.value for event in epochs
    ]


def main() -> None:
    """Print one row per round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--trainable", default="layer4")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels")
    parser.add_argument("--images", type=int, default=320, help="number of images of both splits")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {cache: [] for cache in CACHES}
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = subset(options.data, options.images, folder / "photographs")
        for _ in range(options.rounds):
            losses = {}
            for cache in CACHES:
                epochs, losses[cache] = measure(cache, data, folder, options)
                seconds[cache] += epochs
                progress(f"features.cache {cache}: {epochs} s, training losses {losses[cache]}")
            differences.append(max(abs(a - b) for a, b in zip(losses["on"], losses["off"], strict=True)))
    rows = [[cache, f"{median(values):.1f}", str(len(values))] for cache, values in seconds.items()]
    print_table(["features.cache", "seconds per epoch, median", "epochs"], rows)
    ratio = median(seconds["off"]) / median(seconds["on"])
    print(f"{ratio:.2f} x; largest difference of the losses {max(differences):.1e}")


if __name__ == "__main__":
    main()
