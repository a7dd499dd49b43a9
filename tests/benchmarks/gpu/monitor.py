"""A callback that records measurements of a fit that the trainer does not log."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch._dynamo.utils import counters

#: Flags that add the callback to a fit.
MONITOR = ("--allow_imports", "tests", "--trainer.callbacks+=tests.benchmarks.gpu.monitor.FitMonitor")


class FitMonitor(pl.Callback):
    """Records epoch times, compiled graphs, peak memory and the fingerprint of the frozen stages.

    Attributes:
        last: The most recent instance; class attribute.
        seconds: Time of the training batches of each epoch, without validation.
        graphs: Total number of compiled graphs at the end of each epoch.
        peak: Peak GPU memory in bytes; 0 on a CPU.
        fingerprint: SHA-256 of the frozen stages at the end of training.
    """

    last: FitMonitor

    def __init__(self) -> None:
        FitMonitor.last = self
        self.seconds: list[float] = []
        self.graphs: list[int] = []
        self.peak = 0
        self.fingerprint = ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the peak memory of an earlier fit."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._synchronize(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop the clock after the epoch's last batch."""
        if trainer.is_last_batch:
            self._synchronize(pl_module.device)
            self.seconds.append(time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the number of compiled graphs."""
        self.graphs.append(counters["stats"]["unique_graphs"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the peak memory and the fingerprint."""
        if pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(pl_module.device)
        self.fingerprint = pl_module.backbone.fingerprint(pl_module.cut)  # type: ignore[union-attr,operator]

    @staticmethod
    def _synchronize(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
