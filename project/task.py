"""What a label means: how a target is encoded, the loss, the activation, the metrics and the answer.

One class for each kind of task. Everything else speaks of targets, probabilities and answers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

#: Divisor of a summed loss: the number of images, or the sum of their weights.
Weight = torch.Tensor | int


class Answer(NamedTuple):
    """What a model answers for each image.

    Attributes:
        confidence: Probability of the answer, float32 ``(B,)``.
        label: The answer as an index into the classes, int64 ``(B,)``.
    """

    confidence: torch.Tensor
    label: torch.Tensor


class Task(Protocol):
    """How outputs of a head are trained, scored and read."""

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> tuple[torch.Tensor, Weight]:
        """Summed loss of a batch, and what to divide it by for the mean.

        Args:
            logits: ``(B, C)``; B may be 0.
            targets: As the data gives them, or mixed.
            weights: Weight of each class ``(C,)``.
            smoothing: Share of each target that is spread over all classes.
        """

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., C)`` to float32 probabilities of the same shape."""

    def answer(self, scores: torch.Tensor) -> Answer:
        """The answer of each row of scores or probabilities ``(B, C)``."""

    def labels(self, targets: torch.Tensor) -> torch.Tensor:
        """Index of the class that counts as right for each target, int64 ``(B,)``."""

    def is_among(self, scores: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        """Whether the right class is among the so many highest scores, bool ``(B,)``."""

    def training_metrics(self, classes: int) -> MetricCollection:
        """Metrics of training: cheap, and enough to see over-fitting by."""


class SingleLabel:
    """Each image has one class; a target is its index. Softmax and cross-entropy."""

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> tuple[torch.Tensor, Weight]:
        """Cross-entropy.

        Args:
            logits: ``(B, C)``; B may be 0.
            targets: int64 ``(B,)``, or the share of each class, float ``(B, C)``.
            weights: Weight of each class ``(C,)``.
            smoothing: Share of each target that is spread over all classes.

        Returns:
            Its sum, and what torch divides that by for the mean: the number of images, or the weights of their classes.
        """
        summed = functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
        return summed, len(targets) if weights is None or targets.dim() > 1 else weights[targets].sum()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax, in float32."""
        return logits.float().softmax(-1)

    def answer(self, scores: torch.Tensor) -> Answer:
        """The class with the highest score; the first of equal ones."""
        return Answer(*scores.max(1))

    def labels(self, targets: torch.Tensor) -> torch.Tensor:
        """The target itself; of mixed images, the class with the largest share."""
        return targets if targets.dim() == 1 else targets.argmax(1)

    def is_among(self, scores: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        """Whether the class is among the so many highest scores, bool ``(B,)``."""
        return (scores.topk(count).indices == self.labels(targets)[:, None]).any(1)

    def training_metrics(self, classes: int) -> MetricCollection:
        """Accuracy."""
        # Labels are indices of classes by construction; to look each time would cost more than the metric.
        return MetricCollection({"accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)})


def names_of(answer: Answer, classes: Sequence[str]) -> list[str]:
    """Names of the answered classes."""
    return [classes[index] for index in answer.label.tolist()]
