"""Compare exported files with ``load``: classes, probabilities, int8 accuracy and speed.

    python -m tests.benchmarks.exports --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``. EfficientNet-Lite0 has ImageNet weights and a
bicubic resize; ResNet50 has random weights and a bilinear resize. Each file runs on the validation photographs one by
one, in their own sizes; ``load`` gets the same pixels.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from tests.benchmarks.measure import LITE0, print_table, progress, run_module

SETS = ("hymenoptera", "flowers5", "clothing10")
NETWORKS = {"EfficientNet-Lite0": LITE0, "ResNet50, random weights": ("--model.weights", "null")}
FILES = {
    "ONNX": ("--output", "model.onnx"),
    "two ONNX files": ("--output", "model.onnx", "--split", "true"),
    "torch.export": ("--output", "model.pt2"),
    "ONNX, int8": ("--output", "model.onnx", "--int8", "true"),
}


def main() -> None:
    """Print one row per network, data set and kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--files", nargs="+", default=[*FILES], choices=FILES)
    parser.add_argument("--images", type=int, default=300, help="at most so many validation photographs")
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        for name in options.sets:
            with tempfile.TemporaryDirectory() as folder:
                data = ("--data.root", (options.data / name).resolve())
                runs = ("--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false")
                run_module("project", "fit", *NETWORKS[network], *data, *runs, "--trainer.max_epochs", 0)
                (checkpoint,) = Path(folder).glob("*/version_0/checkpoints/best.ckpt")
                for file in options.files:
                    kind, output, *flags = FILES[file]
                    flags = ["--ckpt_path", checkpoint, kind, Path(folder, output), *flags, "--images", options.images]
                    run = run_module("project", "export", *flags)
                    (line,) = re.findall("^Export: .*", run.output, re.MULTILINE)
                    rows.append([network, name, file, line.partition("; ")[2], f"{run.seconds:.0f}"])
                    progress(" | ".join(rows[-1]))
    print_table(["network", "data set", "file", "result", "seconds"], rows)


if __name__ == "__main__":
    main()
