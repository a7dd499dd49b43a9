"""Seconds of ``predict`` with two checkpoints of one backbone, as a multiple of those with one checkpoint.

    python -m tests.benchmarks.many_tasks --data DIR --rounds 7

``DIR`` contains the data sets ``flowers5`` and ``hymenoptera``, each with ``{train,val}/CLASS/*.jpg``. Each gets a
classifier with EfficientNet-Lite0, by a fit of one epoch. Then the photographs of five flowers are predicted with the
first checkpoint, with the second, and with both. The three alternate; the times are those of whole processes. A ratio
compares processes of the same round, so that other load on the machine affects it less.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import LITE0, CompletedRun, print_table, progress, run_fit, run_module, subset

SETS = ("flowers5", "hymenoptera")
BOTH = "both in one process"
TWICE = "one after the other, two processes"


def main() -> None:
    """Print a table with one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--rounds", type=int, default=7, help="processes per variant")
    parser.add_argument("--images", type=int, help="approximate number of photographs to predict; default: all")
    options = parser.parse_args()
    runs: dict[str, list[CompletedRun]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, checkpoints = Path(temporary), []
        for name in SETS:
            flags = [*LITE0, "--trainer.max_epochs", 1, "--dashboard.figures", "false"]
            flags += ["--trainer.default_root_dir", folder / "runs"]
            run_fit(options.data.resolve() / name, folder / "store", *flags)
            checkpoints.append(folder / f"runs/{name}/version_0/checkpoints/best.ckpt")
        photographs = subset(options.data.resolve() / SETS[0], options.images, folder)
        variants = {name: [path] for name, path in zip(SETS, checkpoints, strict=True)} | {BOTH: checkpoints}
        for number in range(options.rounds + 1):
            for name, paths in variants.items():
                flags = [flag for path in paths for flag in ("--ckpt_path", path)]
                predict = ["project", "predict", *flags, "--images", photographs]
                predict += ["--features.folder", folder / "no-rows"]  # the fits have stored those of the photographs
                predict += ["--trainer.enable_progress_bar", "false", "--output", folder / "predictions.csv"]
                run = run_module(*predict)
                if number > 0:  # the first round warms the file caches
                    runs.setdefault(name, []).append(run)
            progress(f"round {number}: {', '.join(f'{part[-1].seconds:.2f}' for part in runs.values())} s")
        count = len((folder / "predictions.csv").read_text().splitlines()) - 1
    seconds = {name: [run.seconds for run in part] for name, part in runs.items()}
    cpu_seconds = {name: [run.cpu_seconds for run in part] for name, part in runs.items()}
    for values in (seconds, cpu_seconds):
        values[TWICE] = [sum(pair) for pair in zip(*(values[name] for name in SETS), strict=True)]
    rows = []
    for name in (*SETS, TWICE, BOTH):
        cells = [name]
        for values in (seconds, cpu_seconds):
            # One checkpoint takes the mean of both variants in the round.
            ratios = [2 * value / both for value, both in zip(values[name], values[TWICE], strict=True)]
            cells += [f"{median(values[name]):.2f}", f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"]
        rows.append(cells)
    header = ["seconds, median", "against one checkpoint (min to max)"]
    print_table([f"{count} photographs", *header, f"CPU {header[0]}", header[1]], rows)


if __name__ == "__main__":
    main()
