"""``predict`` of many small images that is killed several times: every path once, and memory that stays flat.

    python -m tests.benchmarks.predict_scale --images 200000 --kills 5

Images of 32 x 32 pixels are drawn into folders of 1,000, and a small network with random weights gets a head by a fit.
Then ``predict`` runs as a process of its own. It is killed with SIGKILL, at evenly spaced numbers of finished images,
and repeated. The resident memory of the process and its children is sampled. The table has the peak in each quarter of
the images, of those runs that began before the quarter, and the reused images of each run.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.measure import ROOT, print_table, progress, run_module

SIDE = 32
PER_FOLDER = 1000
NETWORK = ("--model.backbone", "timm/test_resnet", "--model.weights", "null", "--model.image_size", SIDE)
PART = re.compile(r"(\d{12})-(\d{12})-\d+")


def draw(folder: Path, count: int) -> None:
    """Write distinct images of noise, as PNG."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // PER_FOLDER:04}" / f"{number:07}.png"
        if number % PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path, compress_level=1)


def train(folder: Path) -> Path:
    """Fit a head on a few images; returns the checkpoint."""
    for name in ("a", "b"):
        draw(folder / "labeled" / name, 20)
    flags = [*NETWORK, "--trainer.max_epochs", 1, "--dashboard.figures", "false", "--data.num_workers", 0]
    flags += ["--trainer.default_root_dir", folder / "runs", "--trainer.accelerator", "cpu"]
    run_module("project", "fit", "--data.root", folder / "labeled", *flags)
    (checkpoint,) = (folder / "runs").rglob("best.ckpt")
    return checkpoint


def finished(parts: Path) -> int:
    """Number of images in finished parts."""
    matches = (PART.match(path.name) for path in parts.glob("0*.csv"))
    return sum(int(match[2]) - int(match[1]) for match in matches if match)


def resident(process: int) -> float:
    """Resident memory of a process and its descendants in MB; pages that they share count once."""
    total, waiting = 0.0, [process]
    while waiting:
        current = waiting.pop()
        try:
            status = Path(f"/proc/{current}/smaps_rollup").read_text()
            tasks = [*Path(f"/proc/{current}/task").iterdir()]
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        found = re.search(r"Pss:\s+(\d+) kB", status)
        total += int(found[1]) / 1024 if found else 0.0
    return total


def samples(process: subprocess.Popen[bytes], parts: Path) -> Iterator[tuple[int, float]]:
    """Finished images and resident memory, four times per second, until the process ends."""
    while process.poll() is None:
        yield finished(parts), resident(process.pid)
        time.sleep(0.25)


def check(output: Path, folder: Path, count: int) -> None:
    """Compare the paths in the table with the files.

    Raises:
        RuntimeError: A path is missing or repeated, or an image could not be read.
    """
    expected = (f"{folder}/{n // PER_FOLDER:04}/{n:07}.png" for n in range(count))
    with output.open(newline="") as file:
        rows = csv.DictReader(file)
        for number, (row, path) in enumerate(zip(rows, expected, strict=True)):
            if row["path"] != path or row["error"] or not row["predicted"]:
                raise RuntimeError(f"Row {number} is {row}, not of {path}.")


def main() -> None:
    """Print the memory in each quarter, and what each run has reused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of predict, at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint = train(work)
        draw(work / "new", options.images)
        progress(f"{options.images:,} images drawn")
        output = work / "predictions.csv"
        parts = output.with_name(f"{output.name}.parts")
        command = [sys.executable, "-m", "project", "predict", "--ckpt_path", checkpoint, "--images", work / "new"]
        command += ["--output", output, "--features.folder", work / "no-rows"]
        command += ["--trainer.enable_progress_bar", "false", *options.flags]
        quarters: list[list[float]] = [[] for _ in range(4)]
        rows = []
        for run in range(options.kills + 1):
            target = options.images * (run + 1) // (options.kills + 1) if run < options.kills else None
            before, start, peak = finished(parts), time.perf_counter(), 0.0
            with (work / "log.txt").open("wb") as log:
                process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                for done, memory in samples(process, parts):
                    peak = max(peak, memory)
                    if done > before:  # the start of a run imports libraries and lists the images
                        quarters[min(4 * done // options.images, 3)].append(memory)
                    if target is not None and done >= target:
                        os.kill(process.pid, signal.SIGKILL)
                        process.wait()
            if process.returncode != (0 if target is None else -signal.SIGKILL):
                raise RuntimeError((work / "log.txt").read_text())
            seconds = time.perf_counter() - start
            after = options.images if target is None else finished(parts)
            rows.append([f"{run + 1}", f"{before:,}", f"{after - before:,}", f"{seconds:.1f}", f"{peak:.0f}"])
            progress(f"run {run + 1}: {after:,} images")
        check(output, work / "new", options.images)
        log_text = (work / "log.txt").read_text()
    print_table(["run", "reused", "predicted", "seconds", "peak MB"], rows)
    cells = [[f"{number + 1}", f"{max(part):.0f}" if part else "-"] for number, part in enumerate(quarters)]
    print_table(["quarter of the images", "peak MB"], cells)
    print(f"Every one of {options.images:,} paths is in the table once, in order, after {options.kills} kills.")
    print("\n".join(line for line in log_text.splitlines() if line.startswith(("Features:", "Predictions:"))))


if __name__ == "__main__":
    main()
