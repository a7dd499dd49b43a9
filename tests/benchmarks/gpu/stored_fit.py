"""(b) The project's whole ``fit`` on stored rows, cold and warm, against the article's loop on the same card."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.launch import features_lines, timed_fit
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.measure import process

EPOCHS = 10


def stored_fit(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Time whole processes: the article's loop, a fit on an empty store, and one on a full store."""
    network, size = scale.finetuned
    article: dict[int, float] = {}
    for workers in sorted({0, scale.workers}):
        ran = process(
            *("tests.benchmarks.contestants", "article", "--data", photographs, "--network", network, "--size", size),
            # Without workers an epoch takes long: some batches of it are enough.
            *("--epochs", 2 if workers else 1, "--batches", 0 if workers else 16),
            *("--device", scale.device.type, "--workers", workers),
        )
        epochs: list[float] = json.loads(ran.output.splitlines()[-1])["epochs"]
        article[workers] = ran.seconds + (EPOCHS - len(epochs)) * epochs[-1]
        note = f"{EPOCHS} epochs, extrapolated from {len(epochs)}; {epochs[-1]:.2f} s an epoch"
        out.add(f"article's loop, {workers} workers, whole process", article[workers], "s", note)
    best = min(article.values())
    for precision, states in ((scale.mixed[0], {"cold": 0.001, "warm": 0.01}), ("32-true", {"cold": 0.001})):
        flags = scale.flags(photographs, work / f"store-{precision}", work / "runs")
        for state, rate in states.items():
            more = ("--trainer.precision", precision, "--trainer.max_epochs", EPOCHS, "--model.optimizer.lr", rate)
            ran = timed_fit(scale, *flags, *more, cache=work / "inductor")
            note = f"{best / ran.seconds:.1f} times the article's faster loop; {features_lines(ran.output)}"
            out.add(f"fit, {precision}, {state}, whole process", ran.seconds, "s", note)
