"""Throughput and agreement of ``predict`` and ``load`` on the GPU."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from project import load
from project.cli.main import main
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.scale import Scale


def inference(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Train a head, time ``predict`` and ``load``, and compare the features of both devices.

    Raises:
        RuntimeError: A command failed.
    """
    runs = work / "runs"
    checkpoint = train_head(scale, photographs, work / "store", runs)
    table = work / "predictions.csv"
    start = time.perf_counter()
    code = main(
        [
            *("predict", "--ckpt_path", str(checkpoint), "--data.predict", str(photographs / "val")),
            *("--output", str(table), "--data.batch_size", str(scale.batch_size)),
            *("--data.num_workers", str(scale.workers), "--trainer.accelerator", scale.accelerator),
            *("--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        ]
    )
    seconds = time.perf_counter() - start
    if code:
        raise RuntimeError(f"predict exited with code {code}.")
    rows = table.read_text().splitlines()[1:]
    out.add("predict", len(rows) / seconds, "images/s", f"{len(rows)} photographs, including start-up of workers")
    paths = sorted((photographs / "val").rglob("*.jpg"))[: 4 * scale.batch_size]
    features: dict[str, np.ndarray] = {}
    for device in dict.fromkeys(("cpu", scale.device.type)):
        classifier = load(checkpoint, device=device)
        timed = paths if device != "cpu" else paths[:8]
        features[device] = classifier.features(paths[:8])
        start = time.perf_counter()
        classifier.predict_proba(timed)
        rate = len(timed) / (time.perf_counter() - start)
        note = f"{len(timed)} photographs, decoded by one thread"
        out.add(f"load and predict_proba on {device}", rate, "images/s", note)
    # Not probabilities: with random weights they saturate at 0 or 1, whatever the features.
    reference, actual = features["cpu"], features[scale.device.type]
    difference = float(abs(reference - actual).max() / abs(reference).max())
    note = f"relative difference {difference:.1e}"
    out.check("features of load are equal on the device and on the CPU", difference < 2e-2, note)


def train_head(scale: Scale, photographs: Path, store: Path, runs: Path) -> Path:
    """Train a head for two epochs and return the path of its checkpoint.

    Raises:
        RuntimeError: The fit failed.
    """
    flags = scale.flags(photographs, store, runs)
    more = ("--features.engine", "torch", "--trainer.max_epochs", "2", "--dashboard.figures", "false")
    if main(["fit", *flags, *more]):
        raise RuntimeError("The fit failed.")
    return sorted(runs.rglob("best.ckpt"))[-1]
