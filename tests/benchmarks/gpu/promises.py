"""(d) What has to hold on a card; the tests marked ``gpu`` ask the same functions."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from project import load
from project.cli.main import main
from project.features.engines import DTYPES, ExactEngine, TorchEngine
from project.features.frozen_prefix import FrozenPrefix
from project.models.backbone import load_backbone
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.finetune import Setting, run_project
from tests.benchmarks.gpu.inference import train_head
from tests.benchmarks.gpu.photographs import repeat
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.gpu.watch import Watch
from tests.forked import start

#: Smallest cosine similarity and largest difference, relative to the largest value, between rows of two devices.
#: cuDNN computes convolutions of float32 in TF32, which has 10 bits of mantissa.
CLOSE = {"fp32": (0.9999, 2e-2), "bf16": (0.99, 0.2), "fp16": (0.999, 0.05)}


@dataclass(frozen=True)
class Agreement:
    """How close rows of a device are to those of the CPU in full precision.

    Attributes:
        cosine: Smallest cosine similarity of a row.
        difference: Largest absolute difference, divided by the largest absolute value.
    """

    cosine: float
    difference: float

    def holds(self, precision: str) -> bool:
        """Whether the rows are as close as the precision allows."""
        cosine, difference = CLOSE[precision]
        return self.cosine > cosine and self.difference < difference

    def __str__(self) -> str:
        return f"cosine at least {self.cosine:.6f}, largest relative difference {self.difference:.1e}"


def rows_agree(scale: Scale, precision: str, network: str, size: int, weights: str | None = None) -> Agreement:
    """Compare rows of one network, at so many pixels, on the device with those on the CPU in full precision."""
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = load_backbone(network, weights, image_size=size).eval()
    exact = ExactEngine(backbone, torch.device("cpu"))(images).flatten(1)
    if precision == "fp32":
        rows = ExactEngine(backbone.to(scale.device), scale.device)(images).flatten(1)
    else:
        rows = (
            TorchEngine(FrozenPrefix(backbone, backbone.cut, DTYPES[precision]), scale.device, compiled=False)(images)
            .flatten(1)
            .float()
        )
    return Agreement(
        float(functional.cosine_similarity(rows, exact).min()),
        float((rows - exact).abs().max() / exact.abs().max()),
    )


def frozen_is_unchanged(scale: Scale, photographs: Path, work: Path, setting: Setting) -> tuple[bool, str]:
    """Fine-tune and compare the frozen stages' SHA-256 at the end with that of a backbone loaded anew on the CPU."""
    run_project(scale, photographs, work, setting)
    name, size = scale.finetuned
    fresh = load_backbone(name, None, size)
    expected = fresh.fingerprint(fresh.cut_at(setting.trainable))
    return Watch.last.fingerprint == expected, expected[:12]


def resumed_ways(scale: Scale) -> dict[str, tuple[str, ...]]:
    """Flags of each way to train that is killed and resumed."""
    live = ("--features.cache", "off", "--model.trainable", "layer4", "--trainer.precision")
    # One precision alone: two that may be chosen are measured, and a disturbed measurement may choose another.
    stored = ("--features.engine", "torch", "--features.precision", "bf16", "--trainer.precision", scale.mixed[0])
    return {f"stored rows, {scale.mixed[0]}": stored, **{f"live layer4, {each}": (*live, each) for each in scale.mixed}}


def resumes_to_the_bit(scale: Scale, photographs: Path, folder: Path, flags: Sequence[str]) -> tuple[bool, str]:
    """Kill a fit in its second epoch, resume it, and compare its last checkpoint with that of an uninterrupted fit.

    Returns:
        Whether weights and optimizer states are equal to the bit, and where they first differ.
    """
    shared = scale.flags(photographs, folder / "store", Path("runs"))
    command = ["fit", *shared, "--trainer.max_epochs", "2", "--dashboard.figures", "false", *flags]
    command += ["--trainer.deterministic", "true"]  # cuDNN has faster kernels whose sums differ from run to run
    step = -(-scale.train // scale.batch_size) + 1
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir(parents=True)
    fits = [(start(whole, command), 0), (start(killed, command, {"step": step}), -signal.SIGKILL)]
    for fit, expected in fits:
        if (code := fit.wait(120)) != expected:
            return False, f"exit code {code} instead of {expected}: {fit.said[-300:]}"
    if not list((killed / "runs").rglob("last.ckpt")):
        return False, "the killed fit left no checkpoint to resume from"
    resumed = start(killed, [*command, "--ckpt_path", "last"])
    if code := resumed.wait(120):
        return False, f"exit code {code} of the resumed fit: {resumed.said[-300:]}"
    one, other = (
        torch.load(sorted((place / "runs").rglob("last.ckpt"))[-1], map_location="cpu", weights_only=True)
        for place in (whole, killed)
    )
    for part in ("state_dict", "optimizer_states"):
        if different := _first_difference(one[part], other[part], part):
            return False, f"differs at {different}"
    return True, f"killed in step {step}"


def _first_difference(one: Any, other: Any, where: str) -> str:
    if isinstance(one, torch.Tensor):
        return "" if torch.equal(one, other) else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return where
        return next(filter(None, (_first_difference(one[key], other[key], f"{where}.{key}") for key in one)), "")
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return where
        pairs = enumerate(zip(one, other, strict=True))
        return next(filter(None, (_first_difference(a, b, f"{where}[{at}]") for at, (a, b) in pairs)), "")
    return "" if one == other else where


def checkpoints_cross(scale: Scale, photographs: Path, work: Path) -> list[tuple[str, bool, str]]:
    """Train on the device and load on the CPU, and the reverse; resume on the other device."""
    found = []
    paths = sorted((photographs / "val").rglob("*.jpg"))[:16]
    on_cpu = replace(scale, device=torch.device("cpu"))
    for trained, used in {
        (scale.accelerator, "cpu"): (scale, on_cpu),
        ("cpu", scale.accelerator): (on_cpu, scale),
    }.values():
        folder = work / f"{trained.accelerator}-to-{used.accelerator}"
        checkpoint = train_head(trained, photographs, folder / "store", folder / "runs")
        here = load(checkpoint, device=trained.device).predict_proba(paths)
        there = load(checkpoint, device=used.device).predict_proba(paths)
        worst = float(abs(here - there).max())
        name = f"checkpoint of {trained.accelerator}"
        found.append((f"{name} loaded on {used.accelerator}", worst < 1e-3, f"probabilities at most {worst:.1e} apart"))
        flags = used.flags(photographs, folder / "store", folder / "resumed")
        code = main(["fit", *flags, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3"])
        found.append((f"{name} resumed on {used.accelerator}", code == 0, f"exit code {code}"))
    return found


def out_of_memory(scale: Scale, photographs: Path, work: Path) -> tuple[bool, str]:
    """Fine-tune with less memory than it takes; the fit has to say so in two lines and end with exit code 2."""
    log = io.StringIO()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.001)
    flags = scale.flags(photographs, work / "store", work / "runs")
    greedy = ["--allow_imports", "tests", "--model.head", "tests.benchmarks.gpu.promises.GreedyHead"]
    try:
        with contextlib.redirect_stderr(log):
            code = main(["fit", *flags, "--features.cache", "off", "--trainer.max_epochs", "1", *greedy])
    finally:
        if scale.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    said = log.getvalue()
    error = said[said.rfind("error: ") :].strip()
    holds = code == 2 and "Traceback" not in said and len(error.splitlines()) <= 2 and "Not enough" in error
    return holds, " ".join(error.split())[:200]


class GreedyHead(nn.Linear):
    """A head that asks for more memory than any machine has."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Allocate a petabyte."""
        torch.empty(2**50, dtype=torch.uint8, device=features.device)
        return super().forward(features)


def promises(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Check every promise on the device, with a small network and few images, and add what was found."""
    scale = scale.for_promises()
    photographs = repeat(photographs, work / "photographs", scale.train, scale.val)
    for network, (size, weights) in scale.compared.items():
        for precision in CLOSE:
            if precision == "fp16" and scale.device.type == "cpu":
                continue
            with out.attempt(f"{network}: rows in {precision} agree with the CPU's"):
                found = rows_agree(scale, precision, network, size, weights)
                out.promise(f"{network}: rows in {precision} agree with the CPU's", found.holds(precision), str(found))
    for precision in scale.mixed:
        setting = Setting("layer4", precision)
        with out.attempt(f"frozen SHA-256 unchanged: {setting}"):
            holds, sha = frozen_is_unchanged(scale, photographs, work, setting)
            out.promise(f"frozen SHA-256 unchanged: {setting}", holds, sha)
    for number, (name, flags) in enumerate(resumed_ways(scale).items()):
        with out.attempt(f"kill -9 and resume, equal to the bit: {name}"):
            holds, note = resumes_to_the_bit(scale, photographs, work / f"resumed{number}", flags)
            out.promise(f"kill -9 and resume, equal to the bit: {name}", holds, note)
    with out.attempt("checkpoints of another device"):
        for name, holds, note in checkpoints_cross(scale, photographs, work / "cross"):
            out.promise(name, holds, note)
    with out.attempt("out of memory is reported in two lines"):
        holds, note = out_of_memory(scale, photographs, work)
        out.promise("out of memory is reported in two lines", holds, note)
    if scale.compiles:  # last: it takes the longest
        setting = Setting("layer4", scale.mixed[0], compiled=True)
        with out.attempt(f"frozen SHA-256 unchanged: {setting}"):
            holds, sha = frozen_is_unchanged(scale, photographs, work, setting)
            out.promise(f"frozen SHA-256 unchanged: {setting}", holds, sha)
