"""A callback that notes, in each epoch of a fit, what the trainer does not log."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch._dynamo.utils import counters

#: Flags that add the callback to a fit.
WATCH = ("--allow_imports", "tests", "--trainer.callbacks+=tests.benchmarks.gpu.watch.Watch")


class Watch(pl.Callback):
    """Notes the seconds of each epoch's training batches, compiled graphs, peak memory and the frozen SHA-256.

    Attributes:
        seconds: Of the training batches of each epoch, validation left out.
        graphs: Graphs that torch.compile has made by the end of each epoch.
        peak: Largest memory of the card in bytes.
        fingerprint: SHA-256 of the frozen stages when training ends.
    """

    last: Watch

    def __init__(self) -> None:
        Watch.last = self
        self.seconds: list[float] = []
        self.graphs: list[int] = []
        self.peak = 0
        self.fingerprint = ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the peak of the fit before."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._wait(pl_module.device)
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop the clock after the epoch's last batch."""
        if trainer.is_last_batch:
            self._wait(pl_module.device)
            self.seconds.append(time.perf_counter() - self._began)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the compiled graphs."""
        self.graphs.append(counters["stats"]["unique_graphs"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the peak and the fingerprint."""
        if pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(pl_module.device)
        self.fingerprint = pl_module.backbone.fingerprint(pl_module.cut)  # type: ignore[union-attr,operator]

    @staticmethod
    def _wait(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
