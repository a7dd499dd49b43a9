"""What an epoch adds up to, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MetricCollection

from project.evaluation.confusion import Counts
from project.models.loss import Weight
from project.runtime.distributed import processes


class MeanLoss:
    """The mean over an epoch, of all processes. A torchmetrics.MeanMetric would take a good part of each step."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, Weight]] = []

    def add(self, summed: torch.Tensor, weight: Weight) -> None:
        """Add a batch."""
        self._parts.append((summed.detach(), weight))

    def take(self, device: torch.device) -> torch.Tensor:
        """The mean of what was added since it was last taken; all processes take it together."""
        parts, self._parts = self._parts, []
        sums = torch.zeros(2, device=device)
        if parts:
            summed, weights = zip(*parts, strict=True)
            of_weights = sum(weights) if isinstance(weights[0], int) else torch.stack(weights).sum()
            sums = torch.stack([torch.stack(summed).sum(), torch.as_tensor(of_weights, device=device)])
        if processes() > 1:
            dist.all_reduce(sums)
        return sums[0] / sums[1]

    def state(self) -> dict[str, torch.Tensor]:
        """What was added since it was last taken."""
        summed, weights = zip(*self._parts, strict=True) if self._parts else ((), ())
        return {
            "sums": torch.stack(summed) if summed else torch.zeros(0),
            "weights": torch.tensor(weights) if not weights or isinstance(weights[0], int) else torch.stack(weights),
        }

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add what another one was given, before its own."""
        weights = state["weights"]
        before = weights.unbind() if weights.is_floating_point() else weights.tolist()
        self._parts = [*zip(state["sums"].unbind(), before, strict=True), *self._parts]


class Tally(nn.Module):
    """The mean loss of an epoch and its metrics, over all processes.

    Args:
        stage: ``train``, ``val`` or ``test``.
        metrics: Of probabilities ``(B, C)`` and labels ``(B,)``.
        classes: Number C of classes.
    """

    def __init__(self, stage: str, metrics: MetricCollection, classes: int) -> None:
        super().__init__()
        self.metrics = metrics
        self._loss_name = f"{stage}/loss"
        self._loss = MeanLoss()
        #: What evaluation came to, image by image; nothing is kept of training.
        self.counts = None if stage == "train" else Counts(classes)

    def add(self, loss: tuple[torch.Tensor, Weight], probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch.

        Args:
            loss: Its sum over the batch, and the weight to divide that by.
            probabilities: ``(B, C)``.
            labels: int64 ``(B,)``.
        """
        self._loss.add(*loss)
        self.metrics.update(probabilities, labels)
        if self.counts is not None:
            self.counts.add(probabilities, labels)

    def take(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The loss and the metrics by name, and begin anew; all processes take them together."""
        # Computed here rather than logged as objects: a metric of each class is a dict, which log() does not take.
        values = {self._loss_name: self._loss.take(device), **self.metrics.compute()}
        self.metrics.reset()
        if self.counts is not None:
            self.counts.take(device)
        return values

    def reset(self) -> None:
        """Forget what was added."""
        self._loss = MeanLoss()
        self.metrics.reset()
        if self.counts is not None:
            self.counts.reset()

    def state(self) -> dict[str, Any]:
        """What this process has added since the epoch began, as tensors."""
        metrics = {name: dict(metric.metric_state) for name, metric in self.metrics.items(keep_base=True)}
        return {"loss": self._loss.state(), "metrics": metrics}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of another one."""
        device = next((m.device for m in self.metrics.values()), torch.device("cpu"))
        self._loss.merge({name: value.to(device) for name, value in state["loss"].items()})
        for name, values in state["metrics"].items():
            self.metrics[name].merge_state({key: value.to(device) for key, value in values.items()})
