"""Loss and metrics of an epoch, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MetricCollection

from project.evaluation.confusion import ConfusionCounts, ImagePredictions
from project.evaluation.metrics import MAX_SCORED_CLASSES, calibration_error, class_scores, macro_f1
from project.runtime.distributed import world_size
from project.task import Task, Weight

NO_PREDICTIONS = ImagePredictions(
    *(torch.zeros(0, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.int64, torch.bool))
)


class MeanLoss:
    """Weighted mean of the loss over an epoch and all ranks; cheaper per step than ``torchmetrics.MeanMetric``."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, Weight]] = []

    def update(self, summed: torch.Tensor, weight: Weight) -> None:
        """Add a batch."""
        self._batches.append((summed.detach(), weight))

    def compute(self, device: torch.device) -> torch.Tensor:
        """Compute the mean and reset. Collective: all ranks must call it."""
        batches, self._batches = self._batches, []
        sums = torch.zeros(2, device=device)
        if batches:
            summed, weights = zip(*batches, strict=True)
            total_weight = sum(weights) if isinstance(weights[0], int) else torch.stack(weights).sum()
            sums = torch.stack([torch.stack(summed).sum(), torch.as_tensor(total_weight, device=device)])
        if world_size() > 1:
            dist.all_reduce(sums)
        return sums[0] / sums[1]

    def state(self) -> dict[str, torch.Tensor]:
        """Accumulated batches, as tensors."""
        summed, weights = zip(*self._batches, strict=True) if self._batches else ((), ())
        return {
            "sums": torch.stack(summed) if summed else torch.zeros(0),
            "weights": torch.tensor(weights) if not weights or isinstance(weights[0], int) else torch.stack(weights),
        }

    def merge(self, state: Mapping[str, torch.Tensor]) -> None:
        """Insert the batches of a saved state before the accumulated ones."""
        weights = state["weights"]
        saved = weights.unbind() if weights.is_floating_point() else weights.tolist()
        self._batches = [*zip(state["sums"].unbind(), saved, strict=True), *self._batches]


class EpochMetrics(nn.Module):
    """Mean loss and metrics of an epoch, over all ranks.

    Evaluation stores the prediction of each image and computes all metrics from these at the end of the epoch.

    Args:
        stage: ``train``, ``val`` or ``test``; prefix of the metric names.
        task: Task of the model.
        classes: Class names.

    Attributes:
        predictions: This rank's predictions of the latest evaluation.
        counts: Counts of the latest evaluation, over all ranks.
    """

    def __init__(self, stage: str, task: Task, classes: Sequence[str]) -> None:
        super().__init__()
        self._stage = stage
        self._task = task
        self._classes = tuple(classes)
        self._loss = MeanLoss()
        self._batches: list[ImagePredictions] = []
        self.metrics = task.training_metrics(len(classes)) if stage == "train" else MetricCollection({})
        self.predictions = NO_PREDICTIONS
        self.counts: ConfusionCounts | None = None

    def update(self, loss: tuple[torch.Tensor, Weight], probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch, without padding.

        Args:
            loss: Summed loss of the batch, and the divisor for the mean.
            probabilities: ``(B, C)``.
            labels: int64 ``(B,)``.
        """
        self._loss.update(*loss)
        if self._stage == "train":
            if len(labels):  # a rank may have only padding; torchmetrics rejects empty batches
                self.metrics.update(probabilities, labels)
            return
        in_top5 = self._task.in_top_k(probabilities, labels, 5) if len(self._classes) > 5 else labels >= 0
        self._batches.append(ImagePredictions(*self._task.predict(probabilities), labels, in_top5))

    def compute(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Compute the loss and the metrics by name, and reset. Collective: all ranks must call it."""
        values = {f"{self._stage}/loss": self._loss.compute(device)}
        if self._stage == "train":
            values |= {f"{self._stage}/{name}": value for name, value in self.metrics.compute().items()}
            self.metrics.reset()
            return values
        self.predictions = ImagePredictions(
            *(torch.cat(parts).cpu() for parts in zip(*self._batches or [NO_PREDICTIONS], strict=True))
        )
        self._batches = []
        self.counts = counts = ConfusionCounts.of(self.predictions, len(self._classes), device)
        return values | {f"{self._stage}/{name}": value for name, value in self._scores(counts).items()}

    def _scores(self, counts: ConfusionCounts) -> dict[str, torch.Tensor]:
        """Accuracy, macro F1, calibration error, top-5 for more than five classes, and per-class scores."""
        per_class = counts.hits, counts.support, counts.predicted
        scores = {
            "accuracy": counts.hits.sum() / counts.support.sum(),
            "f1": macro_f1(*per_class),
            "ece": calibration_error(counts.calibration),
        }
        if len(self._classes) > 5:
            scores["top5"] = torch.tensor(counts.in_top5) / counts.support.sum()
        if len(self._classes) <= MAX_SCORED_CLASSES:
            # Classes without images have no scores. The precision of a class that is never predicted is logged as 0,
            # so that a callback that monitors it finds a value in every epoch.
            scores |= {
                f"{name}_of/{label}": value.nan_to_num(0.0)
                for name, values in class_scores(*per_class).items()
                for label, value, images in zip(self._classes, values, counts.support, strict=True)
                if images
            }
        return scores

    def reset(self) -> None:
        """Discard the accumulated batches."""
        self._loss = MeanLoss()
        self.metrics.reset()
        self._batches = []

    def state(self) -> dict[str, Any]:
        """State of this rank's current training epoch, as tensors."""
        metrics = {name: dict(metric.metric_state) for name, metric in self.metrics.items(keep_base=True)}
        return {"loss": self._loss.state(), "metrics": metrics}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add a saved state to the current one."""
        device = next((m.device for m in self.metrics.values()), torch.device("cpu"))
        self._loss.merge({name: value.to(device) for name, value in state["loss"].items()})
        for name, values in state["metrics"].items():
            self.metrics[name].merge_state({key: value.to(device) for key, value in values.items()})
