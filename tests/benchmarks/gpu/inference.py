"""(e) ``predict`` and ``load`` on the card."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from project import load
from project.cli.main import main
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.scale import Scale


def inference(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Train a head, then time ``predict`` and ``load`` and compare their answers.

    Raises:
        RuntimeError: A command failed.
    """
    runs = work / "runs"
    checkpoint = train_head(scale, photographs, work / "store", runs)
    table = work / "predictions.csv"
    began = time.perf_counter()
    code = main(
        [
            *("predict", "--ckpt_path", str(checkpoint), "--data.predict", str(photographs / "val")),
            *("--output", str(table), "--data.batch_size", str(scale.batch_size)),
            *("--data.num_workers", str(scale.workers), "--trainer.accelerator", scale.accelerator),
            *("--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        ]
    )
    seconds = time.perf_counter() - began
    if code:
        raise RuntimeError(f"predict ended with exit code {code}.")
    rows = table.read_text().splitlines()[1:]
    out.add("predict", len(rows) / seconds, "images/s", f"{len(rows)} photographs, start-up of workers included")
    paths = sorted((photographs / "val").rglob("*.jpg"))[: 4 * scale.batch_size]
    features: dict[str, np.ndarray] = {}
    for device in dict.fromkeys(("cpu", scale.device.type)):
        classifier = load(checkpoint, device=device)
        few = paths if device != "cpu" else paths[:8]
        features[device] = classifier.features(paths[:8])
        began = time.perf_counter()
        classifier.predict_proba(few)
        rate = len(few) / (time.perf_counter() - began)
        out.add(f"load and predict_proba on {device}", rate, "images/s", f"{len(few)} photographs, one thread decodes")
    # Not probabilities: those of random weights are 0 or 1, whatever the features.
    exact, found = features["cpu"], features[scale.device.type]
    worst = float(abs(exact - found).max() / abs(exact).max())
    out.promise("load on the device gives the features of load on the CPU", worst < 2e-2, f"{worst:.1e} relative")


def train_head(scale: Scale, photographs: Path, store: Path, runs: Path) -> Path:
    """Train a head for two epochs; the path of its checkpoint.

    Raises:
        RuntimeError: The fit failed.
    """
    flags = scale.flags(photographs, store, runs)
    more = ("--features.engine", "torch", "--trainer.max_epochs", "2", "--dashboard.figures", "false")
    if main(["fit", *flags, *more]):
        raise RuntimeError("The fit failed.")
    return sorted(runs.rglob("best.ckpt"))[-1]
