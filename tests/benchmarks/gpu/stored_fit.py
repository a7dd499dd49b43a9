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
    ran = process(
        *("tests.benchmarks.contestants", "article", "--data", photographs, "--network", network, "--size", size),
        *("--epochs", 2, "--device", scale.device.type, "--workers", scale.workers),
    )
    epochs: list[float] = json.loads(ran.output.splitlines()[-1])["epochs"]
    article = ran.seconds + (EPOCHS - len(epochs)) * epochs[-1]
    note = f"{EPOCHS} epochs, extrapolated from {len(epochs)}; {epochs[-1]:.2f} s an epoch; {scale.workers} workers"
    out.add("article's loop, whole process", article, "s", note)
    precision = scale.mixed[0]
    flags = scale.flags(photographs, work / "store", work / "runs")
    for state, rate in {"cold": 0.001, "warm": 0.01}.items():
        more = ("--trainer.precision", precision, "--trainer.max_epochs", EPOCHS, "--model.optimizer.lr", rate)
        ran = timed_fit(scale, *flags, *more, cache=work / "inductor")
        note = f"{article / ran.seconds:.1f} times the article's loop; {features_lines(ran.output)}"
        out.add(f"fit, {precision}, {state}, whole process", ran.seconds, "s", note)
