"""Cost of the dashboards in a fit on stored rows: seconds of whole processes and bytes written.

    python -m tests.benchmarks.dashboard --data DIR/flowers5 --epochs 10 --rounds 7

A fit before the measured ones computes the rows. The variants alternate, so that other load on the machine affects all
of them alike. The last row is a fit without a logger.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import LITE0, print_table, progress, run_module

NO_LOGGER = "no logger (`--trainer.logger false`)"
VARIANTS: dict[str, tuple[str, ...]] = {
    "figures, curves and projector (the default)": (),
    "scalars and texts only (`--dashboard.figures false`)": ("--dashboard.figures", "false"),
    NO_LOGGER: ("--trainer.logger", "false"),
}


def main() -> None:
    """Print a table with one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CLASS/*.jpg or {train,val}/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7, help="fits per variant")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    cpu_seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    written: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        fit = ["project", "fit", "--data.root", options.data.resolve(), "--features.folder", f"{folder}/store", *LITE0]
        fit += ["--model.head_init", "random"]  # the time is that of the epochs
        fit += ["--trainer.max_epochs", options.epochs, "--trainer.enable_progress_bar", "false"]
        run_module(*fit, "--trainer.default_root_dir", f"{folder}/warm")
        for number in range(options.rounds):
            for index, (variant, flags) in enumerate(VARIANTS.items()):
                runs = Path(folder, f"{number}-{index}")
                run = run_module(*fit, "--trainer.default_root_dir", runs, *flags)
                seconds[variant].append(run.seconds)
                cpu_seconds[variant].append(run.cpu_seconds)
                files = [path for path in runs.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
                written[variant] = sum(path.stat().st_size for path in files)
            progress(f"round {number + 1}: {', '.join(f'{values[-1]:.2f}' for values in seconds.values())} s")
    rows = [
        [
            variant,
            f"{median(seconds[variant]):.2f} ({min(seconds[variant]):.2f} to {max(seconds[variant]):.2f})",
            f"{median(seconds[variant]) / median(seconds[NO_LOGGER]) - 1:+.1%}",
            f"{median(cpu_seconds[variant]):.2f}",
            f"{median(cpu_seconds[variant]) / median(cpu_seconds[NO_LOGGER]) - 1:+.1%}",
            f"{written[variant] / 1000:.0f}",
        ]
        for variant in VARIANTS
    ]
    header = ["seconds, median (min to max)", "against no logger", "CPU seconds", "against no logger", "kB written"]
    print_table([f"{options.epochs} epochs", *header], rows)


if __name__ == "__main__":
    main()
