"""Time of ``configs/gpu.yaml``, with random weights because a machine without a network cannot download any."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.launch import features_lines, timed_fit
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.measure import ROOT


def shipped_config(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Run the config on an empty and on a full feature store; on a CPU with a small network."""
    flags: tuple[object, ...] = ("--model.weights", "null", "--trainer.default_root_dir", work / "runs")
    flags += ("--features.folder", work / "store")
    if scale.device.type == "cpu":
        name, size = scale.finetuned
        flags += ("--trainer.accelerator", "cpu", "--model.backbone", name, "--model.image_size", size)
        flags += ("--model.compile", "false", "--data.batch_size", scale.batch_size, "--trainer.max_epochs", 2)
    config = ROOT / "configs" / "gpu.yaml"
    for state in ("cold", "warm"):
        run = timed_fit(scale, "-c", config, "--data.root", photographs, *flags, cache=work / "inductor")
        out.add(f"configs/gpu.yaml, {state}, whole process", run.seconds, "s", features_lines(run.output))
