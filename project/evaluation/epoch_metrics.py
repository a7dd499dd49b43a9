"""What an epoch adds up to, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MetricCollection

from project.evaluation.confusion import ConfusionCounts, ImagePredictions
from project.evaluation.metrics import MOST_CURVES, calibration_error, class_scores, macro_f1
from project.runtime.distributed import processes
from project.task import Task, Weight

NOTHING = ImagePredictions(
    *(torch.zeros(0, dtype=kind) for kind in (torch.float32, torch.int64, torch.int64, torch.bool))
)


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


class EpochMetrics(nn.Module):
    """Mean loss and metrics of an epoch, over all processes.

    In evaluation, the answer to each image is kept, and every metric is derived from these once, at the end.

    Args:
        stage: ``train``, ``val`` or ``test``: the names of the metrics begin with it.
        task: What a target means.
        classes: Names of the classes.
    """

    def __init__(self, stage: str, task: Task, classes: Sequence[str]) -> None:
        super().__init__()
        self._stage = stage
        self._task = task
        self._classes = tuple(classes)
        self._loss = MeanLoss()
        self._answers: list[ImagePredictions] = []
        #: Of training alone.
        self.metrics = task.training_metrics(len(classes)) if stage == "train" else MetricCollection({})
        #: This process's images of the last evaluation that is over, and the counts of all processes.
        self.each = NOTHING
        self.counts: ConfusionCounts | None = None

    def add(self, loss: tuple[torch.Tensor, Weight], probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch, without padding.

        Args:
            loss: Its sum over the batch, and the weight to divide that by.
            probabilities: ``(B, C)``.
            labels: int64 ``(B,)``.
        """
        self._loss.add(*loss)
        if self._stage == "train":
            if len(labels):  # a process may have nothing but padding, which torchmetrics does not take
                self.metrics.update(probabilities, labels)
            return
        within = self._task.is_among(probabilities, labels, 5) if len(self._classes) > 5 else labels >= 0
        self._answers.append(ImagePredictions(*self._task.answer(probabilities), labels, within))

    def take(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The loss and the metrics by name, and begin anew; all processes take them together."""
        # Computed here rather than logged as objects: a metric of each class is a dict, which log() does not take.
        values = {f"{self._stage}/loss": self._loss.take(device)}
        if self._stage == "train":
            values |= {f"{self._stage}/{name}": value for name, value in self.metrics.compute().items()}
            self.metrics.reset()
            return values
        self.each = ImagePredictions(
            *(torch.cat(parts).cpu() for parts in zip(*self._answers or [NOTHING], strict=True))
        )
        self._answers = []
        self.counts = counts = ConfusionCounts.of(self.each, len(self._classes), device)
        return values | {f"{self._stage}/{name}": value for name, value in self._scores(counts).items()}

    def _scores(self, counts: ConfusionCounts) -> dict[str, torch.Tensor]:
        """Accuracy, macro F1, calibration error, top-5 of more than five classes, scores of each class."""
        by_class = counts.hits, counts.support, counts.predicted
        found = {
            "accuracy": counts.hits.sum() / counts.support.sum(),
            "f1": macro_f1(*by_class),
            "ece": calibration_error(counts.calibration),
        }
        if len(self._classes) > 5:
            found["top5"] = torch.tensor(counts.in_top5) / counts.support.sum()
        if len(self._classes) <= MOST_CURVES:
            # A class without an image has none. The precision of one that is never predicted is 0: whatever watches a
            # score finds it in each epoch.
            found |= {
                f"{name}_of/{which}": value.nan_to_num(0.0)
                for name, values in class_scores(*by_class).items()
                for which, value, images in zip(self._classes, values, counts.support, strict=True)
                if images
            }
        return found

    def reset(self) -> None:
        """Forget what was added."""
        self._loss = MeanLoss()
        self.metrics.reset()
        self._answers = []

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
