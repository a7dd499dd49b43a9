"""Throughput and peak memory of live fine-tuning, against a plain PyTorch loop with the same settings.

The photographs are scaled down beforehand, so that the bottleneck is the GPU rather than decoding.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models

from project.cli.main import main
from project.data.dataset import ImageDataset
from project.data.sources.folder import Folder
from project.data.transforms import evaluation
from project.models.loading import load_backbone
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.monitor import MONITOR, FitMonitor
from tests.benchmarks.gpu.photographs import repeat, shrink
from tests.benchmarks.gpu.scale import Scale

LEARNING_RATE = 1e-4
NOISE = 0.03  # relative difference between two runs of the same program


@dataclass(frozen=True)
class Setting:
    """Settings of a fine-tuning fit.

    Attributes:
        trainable: ``layer4`` or ``all``.
        precision: ``trainer.precision``.
        compiled: Whether to use torch.compile.
    """

    trainable: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.trainable}, {self.precision}{', compile' if self.compiled else ''}"


@dataclass(frozen=True)
class Throughput:
    """Throughput and memory of a fine-tuning fit.

    Attributes:
        rate: Training images per second, median of the epochs after the first.
        peak: Peak GPU memory in bytes.
    """

    rate: float
    peak: int


def finetune(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure each setting without torch.compile, alternating between the project and the plain loop."""
    settings = [Setting("layer4", precision) for precision in scale.precisions]
    settings.insert(1, Setting("all", scale.mixed[0]))
    photographs = repeat(shrink(photographs, work / "small"), work / "photographs", scale.train, scale.val)
    for setting in settings:
        with out.record_failure(f"fine-tune {setting}"):
            _compare(scale, photographs, work, setting, out)


def finetune_compiled(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure fine-tuning with torch.compile, in a section of its own because compilation takes most of its time."""
    if not scale.compiles:
        out.add("fine-tune, compile", None, note="skipped on a CPU")
        return
    photographs = repeat(shrink(photographs, work / "small"), work / "photographs", scale.train, scale.val)
    _compare(scale, photographs, work, Setting("layer4", scale.mixed[0], compiled=True), out)


def _compare(scale: Scale, photographs: Path, work: Path, setting: Setting, out: FigureFile) -> None:
    project = run_project(scale, photographs, work, setting)
    torch.compiler.reset()
    plain = run_plain(scale, photographs, setting)
    ratio = project.rate / plain.rate
    memory = f"peak memory {project.peak / 2**30:.2f} GiB; plain loop {plain.peak / 2**30:.2f} GiB"
    out.add(f"fine-tune {setting}", project.rate, "images/s", memory)
    out.add(f"fine-tune {setting}, plain PyTorch loop", plain.rate, "images/s", "same settings and workers")
    out.add(f"fine-tune {setting}, relative to the plain loop", ratio, "times")
    if scale.device.type == "cuda":
        note = f"{ratio:.3f} times; runs of the same program differ by about {NOISE:.0%}"
        out.check(f"fine-tune {setting}: at least as fast as the plain loop", ratio >= 1 - NOISE, note)
    if setting.compiled:
        out.check(f"frozen SHA-256 unchanged: {setting}", *compare_frozen_fingerprint(scale, setting))
        graphs = FitMonitor.last.graphs
        out.check(f"no recompilation after the first epoch: {setting}", graphs[0] == graphs[-1] > 0, f"{graphs}")


def run_project(scale: Scale, photographs: Path, work: Path, setting: Setting) -> Throughput:
    """Run ``python -m project fit`` in this process.

    Raises:
        RuntimeError: The fit failed.
    """
    code = main(
        [
            *("fit", *scale.flags(photographs, work / "store", work / "runs"), *MONITOR, "--features.cache", "off"),
            *("--model.trainable", setting.trainable, "--model.compile", str(setting.compiled).lower()),
            *("--model.optimizer.lr", str(LEARNING_RATE), "--trainer.precision", setting.precision),
            *("--trainer.max_epochs", str(scale.epochs), "--dashboard.figures", "false"),
        ]
    )
    if code:
        raise RuntimeError(f"The fit of {setting} exited with code {code}.")
    monitor = FitMonitor.last
    return Throughput(scale.train / statistics.median(monitor.seconds[1:]), monitor.peak)


def compare_frozen_fingerprint(scale: Scale, setting: Setting) -> tuple[bool, str]:
    """Compare the frozen stages' SHA-256 after the latest fit with that of a newly loaded backbone on the CPU.

    Returns:
        Whether they are equal, and the first digits of the expected SHA-256.
    """
    name, size = scale.finetuned
    backbone = load_backbone(name, None, size)
    expected = backbone.fingerprint(backbone.cut_at(setting.trainable))
    return FitMonitor.last.fingerprint == expected, expected[:12]


def run_plain(scale: Scale, photographs: Path, setting: Setting) -> Throughput:
    """Train a torchvision ResNet in a plain loop with autocast, GradScaler, and frozen stages in ``eval()``."""
    name, size = scale.finetuned
    device, dtype = scale.device, {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(setting.precision)
    preprocessing = load_backbone(name, None, size).preprocessing
    source = Folder(str(photographs))  # the project's decoding, so that only the training loops differ
    data = ImageDataset(source.splits["train"], source, evaluation(preprocessing))
    loader = DataLoader(
        data,
        batch_size=scale.batch_size,
        shuffle=True,
        num_workers=scale.workers,
        persistent_workers=scale.workers > 0,
        pin_memory=device.type == "cuda",
    )
    model = models.get_model(name, weights=None)
    model.fc = nn.Linear(model.fc.in_features, len(source.classes))
    modules = list(model.children())
    cut = 0 if setting.trainable == "all" else modules.index(model.layer4)
    frozen, trainable = nn.Sequential(*modules[:cut]), nn.Sequential(*modules[cut:-1], nn.Flatten(), modules[-1])
    for half in (frozen, trainable):
        half.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen.requires_grad_(False).eval()
    trainable.train()
    # Not dynamic: both halves share their code, so that torch.compile would take their shapes for dynamic ones.
    encode, classify = (
        torch.compile(half, dynamic=False) if setting.compiled else half for half in (frozen, trainable)
    )
    optimizer = torch.optim.SGD(trainable.parameters(), lr=LEARNING_RATE, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mean, std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (preprocessing.mean, preprocessing.std))
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(scale.epochs):
        start = time.perf_counter()
        for images, labels, _ in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            values = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                with torch.no_grad():
                    features = encode(values)
                loss = nn.functional.cross_entropy(classify(features), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Throughput(len(data) / statistics.median(seconds[1:]), peak)
