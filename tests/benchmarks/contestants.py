"""Baselines that the project is compared with. Each is a program that prints a line of JSON at the end.

    python -m tests.benchmarks.contestants article --data DIR
    python -m tests.benchmarks.contestants lightning --data DIR --precision bf16-mixed
    python -m tests.benchmarks.contestants limits --network resnet50

``article`` is the training loop of the article on transfer learning, with its typos corrected. ``lightning`` is an
idiomatic Lightning program. Both use random weights, which take as long as pretrained ones. ``limits`` measures the
matrix multiplication rate of this machine and counts the operations per image.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

BATCH = 32


def image_folder(data: Path, split: str, size: int) -> ImageFolder:
    """A split with the transforms of the article."""
    transforms = [
        Resize(round(size * 256 / 224)),
        CenterCrop(size),
        ToTensor(),
        Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    return ImageFolder(str(data / split), Compose(transforms))


def article(options: argparse.Namespace) -> dict[str, Any]:
    """Run the article's loop: the network in train mode and float32, every image decoded in every epoch."""
    torch.manual_seed(0)
    dataset = image_folder(options.data, "train", options.size)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=options.workers)
    device = torch.device(options.device)
    model = models.get_model(options.network, weights=None)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.fc = nn.Linear(model.fc.in_features, len(dataset.classes))
    model = model.to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
    seconds = []
    for epoch in range(options.epochs):
        start = time.perf_counter()
        model.train()
        running = 0.0
        for inputs, labels in itertools.islice(loader, options.batches or None):
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running += loss.item() * inputs.size(0)
        print(f"Epoch {epoch}: loss {running / len(dataset):.4f}")
        share = min(options.batches or len(loader), len(loader)) / len(loader)
        seconds.append((time.perf_counter() - start) / share)
    return {"epochs": seconds}


def lightning(options: argparse.Namespace) -> dict[str, Any]:
    """Train a head in Lightning on a backbone in ``eval()`` under ``no_grad``, with logger, checkpoints, validation."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger
    from torchmetrics.classification import MulticlassAccuracy

    class Model(pl.LightningModule):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.backbone = models.get_model(options.network, weights=None)
            self.head = nn.Linear(self.backbone.fc.in_features, classes)
            self.backbone.fc = nn.Identity()
            self.backbone.requires_grad_(False).eval().to(memory_format=torch.channels_last)
            self.accuracy = MulticlassAccuracy(classes, average="micro")

        def train(self, mode: bool = True) -> Model:
            super().train(mode)
            self.backbone.eval()
            return self

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                features = self.backbone(inputs.contiguous(memory_format=torch.channels_last))
            return self.head(features)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train/loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            logits = self(batch[0])
            self.accuracy(logits, batch[1])
            self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("val/accuracy", self.accuracy, on_step=False, on_epoch=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.001, momentum=0.9)

    class EpochTimer(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.times.append(time.perf_counter())

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.times.append(time.perf_counter())

    pl.seed_everything(0, verbose=False)
    loader_options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "persistent_workers": True}
    train = image_folder(options.data, "train", options.size)
    timer = EpochTimer()
    with tempfile.TemporaryDirectory() as runs:
        trainer = pl.Trainer(
            accelerator="cpu",
            precision=options.precision,
            max_epochs=options.epochs,
            logger=TensorBoardLogger(runs),
            callbacks=[timer],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(
            Model(len(train.classes)),
            DataLoader(train, shuffle=True, **loader_options),
            DataLoader(image_folder(options.data, "val", options.size), **loader_options),
        )
    return {"epochs": [end - start for start, end in itertools.pairwise(timer.times)]}


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """Measure FLOP/s of a matrix multiplication, and count the FLOP of the frozen prefix per image."""
    from project.features.engine_selection import cost, matmul_flops
    from project.models.loading import load_backbone

    cpu = torch.device("cpu")
    backbone = load_backbone(options.network, None, image_size=options.size)
    return {
        "flops": cost(backbone, backbone.cut, cpu).flops,
        "fp32": matmul_flops("fp32", cpu),
        "bf16": matmul_flops("bf16", cpu),
    }


def main() -> None:
    """Run one program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = {"article": article, "lightning": lightning, "limits": limits}
    parser.add_argument("program", choices=programs)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--network", default="resnet50", help="a torchvision ResNet")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="article: ignored")
    parser.add_argument("--device", default="cpu", help="lightning: ignored")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers; lightning: ignored")
    parser.add_argument("--batches", type=int, default=0, help="batches per epoch, 0 for all; lightning: ignored")
    options = parser.parse_args()
    if options.program != "limits" and options.data is None:
        parser.error(f"{options.program} requires --data")
    warnings.filterwarnings("ignore")
    print(json.dumps(programs[options.program](options)))


if __name__ == "__main__":
    main()
