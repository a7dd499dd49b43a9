"""(c) A live fine-tune against a plain PyTorch loop with the same settings: images per second and peak memory.

The photographs are scaled down beforehand, so that the card is the limit rather than the cores that decode.
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
from project.models.backbone import load_backbone
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.photographs import repeat, shrink
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.gpu.watch import WATCH, Watch

LEARNING_RATE = 1e-4
NOISE = 0.03


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune.

    Attributes:
        trainable: ``layer4`` or ``all``.
        precision: Lightning's name.
        compiled: Whether torch.compile is used.
    """

    trainable: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.trainable}, {self.precision}{', compile' if self.compiled else ''}"


@dataclass(frozen=True)
class Pace:
    """Rate and memory of a fine-tune.

    Attributes:
        rate: Training images per second, median of the epochs after the first.
        peak: Peak memory of the card in bytes.
    """

    rate: float
    peak: int


def finetune(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure each setting that is not compiled, the project and the plain loop in turn."""
    settings = [Setting("layer4", precision) for precision in scale.precisions]
    settings.insert(1, Setting("all", scale.mixed[0]))
    photographs = repeat(shrink(photographs, work / "small"), work / "photographs", scale.train, scale.val)
    for setting in settings:
        with out.attempt(f"fine-tune {setting}"):
            _compare(scale, photographs, work, setting, out)


def finetune_compiled(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure a compiled fine-tune: a section of its own, as most of its time is the compiler's."""
    if not scale.compiles:
        out.add("fine-tune, compile", None, note="not run on a CPU")
        return
    photographs = repeat(shrink(photographs, work / "small"), work / "photographs", scale.train, scale.val)
    _compare(scale, photographs, work, Setting("layer4", scale.mixed[0], compiled=True), out)


def _compare(scale: Scale, photographs: Path, work: Path, setting: Setting, out: FigureFile) -> None:
    ours = run_project(scale, photographs, work, setting)
    torch.compiler.reset()
    plain = run_plain(scale, photographs, setting)
    ratio = ours.rate / plain.rate
    memory = f"peak memory {ours.peak / 2**30:.2f} GiB; the plain loop's {plain.peak / 2**30:.2f} GiB"
    out.add(f"fine-tune {setting}", ours.rate, "images/s", memory)
    out.add(f"fine-tune {setting}, plain PyTorch loop", plain.rate, "images/s", "same settings and workers")
    out.add(f"fine-tune {setting}, times the plain loop", ratio, "times")
    if scale.device.type == "cuda":
        note = f"{ratio:.3f} times; two equal programs differ by some {NOISE:.0%}"
        out.promise(f"fine-tune {setting}: at least as fast as the plain loop", ratio >= 1 - NOISE, note)
    if setting.compiled:
        graphs = Watch.last.graphs
        out.promise(f"no recompilations after the first epoch: {setting}", graphs[0] == graphs[-1] > 0, f"{graphs}")


def run_project(scale: Scale, photographs: Path, work: Path, setting: Setting, *more: str) -> Pace:
    """Run ``python -m project fit`` in this process.

    Raises:
        RuntimeError: The fit failed.
    """
    code = main(
        [
            *("fit", *scale.flags(photographs, work / "store", work / "runs"), *WATCH, "--features.cache", "off"),
            *("--model.trainable", setting.trainable, "--model.compile", str(setting.compiled).lower()),
            *("--model.optimizer.lr", str(LEARNING_RATE), "--trainer.precision", setting.precision),
            *("--trainer.max_epochs", str(scale.epochs), "--dashboard.figures", "false", *more),
        ]
    )
    if code:
        raise RuntimeError(f"The fit of {setting} ended with exit code {code}.")
    watched = Watch.last
    return Pace(scale.train / statistics.median(watched.seconds[1:]), watched.peak)


def run_plain(scale: Scale, photographs: Path, setting: Setting) -> Pace:
    """Train a torchvision ResNet in a plain loop: frozen stages in eval() and without a graph, autocast, GradScaler."""
    name, size = scale.finetuned
    device, dtype = scale.device, {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(setting.precision)
    preprocessing = load_backbone(name, None, size).preprocessing
    source = Folder(str(photographs))  # the project's own decoding, so that the loops alone are compared
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
    parts = list(model.children())
    cut = 0 if setting.trainable == "all" else parts.index(model.layer4)
    frozen, trained = nn.Sequential(*parts[:cut]), nn.Sequential(*parts[cut:-1], nn.Flatten(), parts[-1])
    for part in (frozen, trained):
        part.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen.requires_grad_(False).eval()
    trained.train()
    # Not dynamic: the two halves are the same code with other shapes.
    encode, classify = (torch.compile(part, dynamic=False) if setting.compiled else part for part in (frozen, trained))
    optimizer = torch.optim.SGD(trained.parameters(), lr=LEARNING_RATE, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(scale.epochs):
        began = time.perf_counter()
        for images, labels, _ in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            values = ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                with torch.no_grad():
                    rows = encode(values)
                loss = nn.functional.cross_entropy(classify(rows), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Pace(len(data) / statistics.median(seconds[1:]), peak)
