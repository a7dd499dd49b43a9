"""Correctness checks on a GPU. The tests marked ``gpu`` call the same functions."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Sequence
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
from project.models.loading import load_backbone
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.finetune import Setting, compare_frozen_fingerprint, run_project
from tests.benchmarks.gpu.inference import train_head
from tests.benchmarks.gpu.photographs import repeat
from tests.benchmarks.gpu.scale import Scale
from tests.forked import start

#: Minimum cosine similarity and maximum relative difference between rows of two devices, by precision.
#: cuDNN computes float32 convolutions in TF32, which has 10 bits of mantissa.
TOLERANCES = {"fp32": (0.9999, 2e-2), "bf16": (0.99, 0.2), "fp16": (0.999, 0.05)}


@dataclass(frozen=True)
class Agreement:
    """Agreement of rows of a device with rows of the CPU in full precision.

    Attributes:
        cosine: Minimum cosine similarity over the rows.
        difference: Maximum absolute difference, divided by the maximum absolute value.
    """

    cosine: float
    difference: float

    def holds(self, precision: str) -> bool:
        """Whether the rows agree within the tolerance of the precision."""
        cosine, difference = TOLERANCES[precision]
        return self.cosine > cosine and self.difference < difference

    def __str__(self) -> str:
        return f"minimum cosine {self.cosine:.6f}, maximum relative difference {self.difference:.1e}"


def compare_rows(scale: Scale, precision: str, network: str, size: int, weights: str | None = None) -> Agreement:
    """Compare rows of a network on the device with rows on the CPU in full precision.

    Args:
        scale: Scale of the benchmark, with the device.
        precision: Precision on the device: ``fp32``, ``bf16`` or ``fp16``.
        network: Name of the backbone.
        size: Input size in pixels.
        weights: Weights of the backbone; ``None`` for random ones.
    """
    images = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    backbone = load_backbone(network, weights, image_size=size).eval()
    reference = ExactEngine(backbone, torch.device("cpu"))(images).flatten(1)
    if precision == "fp32":
        rows = ExactEngine(backbone.to(scale.device), scale.device)(images).flatten(1)
    else:
        prefix = FrozenPrefix(backbone, backbone.cut, DTYPES[precision])
        rows = TorchEngine(prefix, scale.device, compiled=False)(images).flatten(1).float()
    return Agreement(
        float(functional.cosine_similarity(rows, reference).min()),
        float((rows - reference).abs().max() / reference.abs().max()),
    )


def check_frozen_fingerprint(scale: Scale, photographs: Path, work: Path, setting: Setting) -> tuple[bool, str]:
    """Fine-tune, and compare the frozen stages' SHA-256 with that of a newly loaded backbone on the CPU."""
    run_project(scale, photographs, work, setting)
    return compare_frozen_fingerprint(scale, setting)


def resume_flags(scale: Scale) -> dict[str, tuple[str, ...]]:
    """Flags of each kind of fit that is killed and resumed."""
    live = ("--features.cache", "off", "--model.trainable", "layer4", "--trainer.precision")
    # A fixed precision: automatic selection depends on a measurement and may differ between the two fits.
    stored = ("--features.engine", "torch", "--features.precision", "bf16", "--trainer.precision", scale.mixed[0])
    mixed = ("--trainer.precision", scale.mixed[0])
    schedule = ("--model.schedule", "{0: head, 1: layer4}", "--model.ema", "0.9", "--features.cache", "off", *mixed)
    low_rank = ("--model.trainable", "layer4", "--model.adapter", "lora", "--features.cache", "off", *mixed)
    return {
        f"stored rows, {scale.mixed[0]}": stored,
        **{f"live layer4, {precision}": (*live, precision) for precision in scale.mixed},
        f"schedule and average, {scale.mixed[0]}": schedule,
        f"low-rank updates, {scale.mixed[0]}": low_rank,
    }


def check_exact_resume(scale: Scale, photographs: Path, folder: Path, flags: Sequence[str]) -> tuple[bool, str]:
    """Kill a fit in its second epoch, resume it, and compare its last checkpoint with that of an uninterrupted fit.

    Returns:
        Whether weights and optimizer states are bit-identical, and where they first differ.
    """
    shared = scale.flags(photographs, folder / "store", Path("runs"))
    command = ["fit", *shared, "--trainer.max_epochs", "2", "--dashboard.figures", "false", *flags]
    command += ["--trainer.deterministic", "true"]  # the default cuDNN kernels may differ between runs
    step = -(-scale.train // scale.batch_size) + 1
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"
    for run_folder in (uninterrupted, killed):
        run_folder.mkdir(parents=True)
    fits = [(start(uninterrupted, command), 0), (start(killed, command, {"step": step}), -signal.SIGKILL)]
    for fit, expected_code in fits:
        if (code := fit.wait(120)) != expected_code:
            return False, f"exit code {code} instead of {expected_code}: {fit.output[-300:]}"
    if not list((killed / "runs").rglob("last.ckpt")):
        return False, "the killed fit left no checkpoint to resume from"
    resumed = start(killed, [*command, "--ckpt_path", "last"])
    if code := resumed.wait(120):
        return False, f"exit code {code} of the resumed fit: {resumed.output[-300:]}"
    expected, actual = (
        torch.load(sorted((run_folder / "runs").rglob("last.ckpt"))[-1], map_location="cpu", weights_only=True)
        for run_folder in (uninterrupted, killed)
    )
    for key in ("state_dict", "average", "optimizer_states"):
        if difference := _first_difference(expected.get(key), actual.get(key), key):
            return False, f"differs at {difference}"
    return True, f"killed in step {step}"


def _first_difference(expected: Any, actual: Any, path: str) -> str:
    """Path of the first difference between two nested values; empty if they are equal."""
    if isinstance(expected, torch.Tensor):
        return "" if torch.equal(expected, actual) else path
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return path
        pairs = [(f"{path}.{key}", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return path
        pairs = [(f"{path}[{index}]", expected[index], actual[index]) for index in range(len(expected))]
    else:
        return "" if expected == actual else path
    return next(filter(None, (_first_difference(a, b, item_path) for item_path, a, b in pairs)), "")


def check_device_transfer(scale: Scale, photographs: Path, work: Path) -> list[tuple[str, bool, str]]:
    """Train on one device, then load and resume on the other, in both directions.

    Returns:
        Name, result and note of each check.
    """
    checks = []
    paths = sorted((photographs / "val").rglob("*.jpg"))[:16]
    on_cpu = replace(scale, device=torch.device("cpu"))
    # Where the device is a CPU, one direction is enough.
    directions = [(scale, on_cpu), (on_cpu, scale)] if scale.device.type != "cpu" else [(on_cpu, on_cpu)]
    for trained, used in directions:
        folder = work / f"{trained.accelerator}-to-{used.accelerator}"
        checkpoint = train_head(trained, photographs, folder / "store", folder / "runs")
        # Without TF32, only the order of additions differs between the devices.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = load(checkpoint, device=trained.device).predict_proba(paths)
            actual = load(checkpoint, device=used.device).predict_proba(paths)
        difference = float(abs(expected - actual).max())
        name = f"checkpoint of {trained.accelerator}"
        note = f"maximum difference of probabilities {difference:.1e}"
        checks.append((f"{name} loaded on {used.accelerator}", difference < 1e-3, note))
        flags = used.flags(photographs, folder / "store", folder / "resumed")
        code = main(["fit", *flags, "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3"])
        checks.append((f"{name} resumed on {used.accelerator}", code == 0, f"exit code {code}"))
    return checks


def check_out_of_memory(scale: Scale, photographs: Path, work: Path) -> tuple[bool, str]:
    """Exhaust the memory; the fit must report it in two lines and exit with code 2."""
    log = io.StringIO()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.001)
    flags = scale.flags(photographs, work / "store", work / "runs")
    greedy = ["--allow_imports", "tests", "--model.head", "tests.benchmarks.gpu.correctness.GreedyHead"]
    try:
        with contextlib.redirect_stderr(log):
            code = main(["fit", *flags, "--features.cache", "off", "--trainer.max_epochs", "1", *greedy])
    finally:
        if scale.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    output = log.getvalue()
    error = output[output.rfind("error: ") :].strip()
    holds = code == 2 and "Traceback" not in output and len(error.splitlines()) <= 2 and "Not enough" in error
    return holds, " ".join(error.split())[:200]


class GreedyHead(nn.Linear):
    """A head that allocates more memory than any machine has."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Allocate a petabyte."""
        torch.empty(2**50, dtype=torch.uint8, device=features.device)
        return super().forward(features)


def correctness(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Run all checks on the device with a small network and few images."""
    scale = scale.for_correctness()
    photographs = repeat(photographs, work / "photographs", scale.train, scale.val)

    def run(name: str, check: Callable[..., tuple[bool, str]], *arguments: Any) -> None:
        with out.record_failure(name):
            out.check(name, *check(*arguments))

    def rows_agree(precision: str, network: str, size: int, weights: str | None) -> tuple[bool, str]:
        agreement = compare_rows(scale, precision, network, size, weights)
        return agreement.holds(precision), str(agreement)

    for network, (size, weights) in scale.compared.items():
        for precision in TOLERANCES:
            if precision != "fp16" or scale.device.type != "cpu":
                name = f"{network}: rows in {precision} agree with the CPU's"
                run(name, rows_agree, precision, network, size, weights)
    for precision in scale.mixed:
        setting = Setting("layer4", precision)
        run(f"frozen SHA-256 unchanged: {setting}", check_frozen_fingerprint, scale, photographs, work, setting)
    for number, (name, flags) in enumerate(resume_flags(scale).items()):
        folder = work / f"resumed{number}"
        run(f"bit-identical after kill -9 and resume: {name}", check_exact_resume, scale, photographs, folder, flags)
    with out.record_failure("checkpoints of another device"):
        for name, holds, note in check_device_transfer(scale, photographs, work / "transfer"):
            out.check(name, holds, note)
    run("out of memory is reported in two lines", check_out_of_memory, scale, photographs, work)
