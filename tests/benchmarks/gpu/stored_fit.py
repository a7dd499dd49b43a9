"""Time of ``fit`` on stored rows, cold and warm, against the article's loop on the same GPU."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.launch import features_lines, timed_fit
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.measure import run_module

EPOCHS = 10


def stored_fit(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Time whole processes: the article's loop, a fit on an empty feature store, and one on a full store."""
    network, size = scale.finetuned
    run = run_module(
        *("tests.benchmarks.contestants", "article", "--data", photographs, "--network", network, "--size", size),
        *("--epochs", 2, "--device", scale.device.type, "--workers", scale.workers),
    )
    epochs: list[float] = json.loads(run.output.splitlines()[-1])["epochs"]
    article = run.seconds + (EPOCHS - len(epochs)) * epochs[-1]
    note = f"{EPOCHS} epochs, extrapolated from {len(epochs)}; {epochs[-1]:.2f} s per epoch; {scale.workers} workers"
    out.add("article's loop, whole process", article, "s", note)
    precision = scale.mixed[0]
    flags = scale.flags(photographs, work / "store", work / "runs")
    flags += ["--trainer.precision", precision, "--trainer.max_epochs", str(EPOCHS)]
    for state, learning_rate in {"cold": 0.001, "warm": 0.01}.items():
        run = timed_fit(scale, *flags, "--model.optimizer.lr", learning_rate, cache=work / "inductor")
        note = f"{article / run.seconds:.1f} times as fast as the article's loop; {features_lines(run.output)}"
        out.add(f"fit, {precision}, {state}, whole process", run.seconds, "s", note)
