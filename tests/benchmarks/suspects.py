"""Recall of ``check --suspects`` on labels that were flipped at random.

    python -m tests.benchmarks.suspects --data DIR --share 0.05

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``. For each, a manifest with flipped labels is
written and checked through the command line; features are computed once for all seeds. The table counts the flipped
labels among the first 20, the first N and the first 2 N suspects, where N labels were flipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from pathlib import Path

from tests.benchmarks.measure import LITE0, ROOT, print_table, progress, run_module


def write_flipped_manifest(root: Path, share: float, seed: int, manifest: Path) -> set[str]:
    """Write a manifest with a share of the labels flipped to another class; return the paths of their images."""
    files = sorted(path for path in root.glob("*/*/*") if path.suffix in (".jpg", ".jpeg"))
    classes = sorted({path.parent.name for path in files})
    generator = random.Random(seed)
    flipped = set(generator.sample(files, round(share * len(files))))
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in files:
            label, split = path.parent.name, path.parent.parent.name
            if path in flipped:
                label = generator.choice([name for name in classes if name != label])
            writer.writerow([path, label, split])
    return {str(path) for path in flipped}


def main() -> None:
    """Print a table with one row per data set and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=["flowers5"], help="names of the data sets")
    parser.add_argument("--share", type=float, default=0.05, help="share of the labels to flip")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            for seed in range(options.seeds):
                manifest, report = Path(folder, f"{name}{seed}.csv"), Path(folder, "report.json")
                flipped = write_flipped_manifest((ROOT / options.data / name).resolve(), options.share, seed, manifest)
                count = len(flipped)
                run_module(
                    *("project", "check", *LITE0, "--data.root", manifest, "--suspects", "--top", 2 * count),
                    *("--json", report, "--features.folder", Path(folder, "store")),
                    expected=(0, 1),
                )
                suspects = [suspect["name"] for suspect in json.loads(report.read_text())["suspects"]]
                first_20, first_n, first_2n = (len(flipped & {*suspects[:top]}) for top in (20, count, 2 * count))
                progress(f"{name} seed {seed}: {first_2n} of {count}")
                hits = [f"{first_20} of 20", str(first_n), f"{first_2n} ({first_2n / count:.0%})"]
                rows.append([name, str(seed), str(count), *hits])
    print_table(["data set", "seed", "N flipped", "in the first 20", "in the first N", "in the first 2 N"], rows)


if __name__ == "__main__":
    main()
