"""Tasks: how targets are encoded, the loss, the activation, the metrics and the decoding of predictions.

The rest of the project is independent of the kind of task.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

#: Divisor of a summed loss: the number of images, or the sum of their weights.
Weight = torch.Tensor | int


class Prediction(NamedTuple):
    """Predicted classes of a batch.

    Attributes:
        confidence: Probability of the predicted class, float32 ``(B,)``.
        label: Index of the predicted class, int64 ``(B,)``.
    """

    confidence: torch.Tensor
    label: torch.Tensor


class Task(Protocol):
    """Interface for training, scoring and decoding the outputs of a head."""

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> tuple[torch.Tensor, Weight]:
        """Summed loss of a batch, and the divisor for the mean.

        Args:
            logits: ``(B, C)``; B may be 0.
            targets: Targets of the data, possibly mixed.
            weights: Weight of each class ``(C,)``.
            smoothing: Label smoothing in [0, 1).
        """

    def target_weights(
        self, targets: torch.Tensor, num_classes: int, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        """Weight of each class in the loss of a target, ``(B, C)``: the loss is ``-sum(weight * log(probability))``.

        Args:
            targets: Targets of the data, not mixed.
            num_classes: Number C of classes.
            weights: Weight of each class ``(C,)``.
            smoothing: Label smoothing in [0, 1).
        """

    def loss_and_gradient(
        self, logits: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of K heads on each row ``(B, K)``, and their gradients with respect to the logits ``(B, K, C)``.

        Args:
            logits: ``(B, K, C)``, overwritten.
            target_weights: From :meth:`target_weights`, ``(B, C)``.
        """

    def curvature(self, logits: torch.Tensor, target_weights: torch.Tensor) -> torch.Tensor:
        """Second derivatives of the losses with respect to each logit ``(B, K, C)``."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``(..., C)`` to float32 probabilities of the same shape."""

    def predict(self, scores: torch.Tensor) -> Prediction:
        """Predicted class of each row of logits or probabilities ``(B, C)``."""

    def labels(self, targets: torch.Tensor) -> torch.Tensor:
        """Index of the true class of each target, int64 ``(B,)``."""

    def in_top_k(self, scores: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
        """Whether the true class is among the k highest scores, bool ``(B,)``."""

    def training_metrics(self, num_classes: int) -> MetricCollection:
        """Metrics that are cheap enough to compute on every training batch."""


class SingleLabel:
    """Single-label classification with softmax and cross-entropy; a target is a class index."""

    def loss(
        self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
    ) -> tuple[torch.Tensor, Weight]:
        """Summed cross-entropy, and the divisor that torch uses for the mean.

        Targets are class indices, int64 ``(B,)``, or class probabilities, float ``(B, C)``.
        """
        summed = functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")
        return summed, len(targets) if weights is None or targets.dim() > 1 else weights[targets].sum()

    def target_weights(
        self, targets: torch.Tensor, num_classes: int, weights: torch.Tensor | None, smoothing: float
    ) -> torch.Tensor:
        """The smoothed one-hot target, times the weights of the classes."""
        hard = functional.one_hot(targets, num_classes).float() * (1 - smoothing)
        if weights is None:
            return hard + smoothing / num_classes
        return hard * weights[targets][:, None] + smoothing / num_classes * weights

    def loss_and_gradient(
        self, logits: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy: the gradient is the probability minus the target."""
        normalizer, total = logits.logsumexp(2), target_weights.sum(1, keepdim=True)
        losses = total * normalizer - torch.bmm(logits, target_weights[..., None])[..., 0]
        gradient = logits.sub_(normalizer[..., None]).exp_().mul_(total[..., None]).sub_(target_weights[:, None])
        return losses, gradient

    def curvature(self, logits: torch.Tensor, target_weights: torch.Tensor) -> torch.Tensor:
        """The variance of each class: p (1 - p)."""
        probabilities = logits.softmax(2)
        return probabilities * (1 - probabilities) * target_weights.sum(1)[:, None, None]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax, in float32."""
        return logits.float().softmax(-1)

    def predict(self, scores: torch.Tensor) -> Prediction:
        """The class with the highest score; the first one of a tie."""
        return Prediction(*scores.max(1))

    def labels(self, targets: torch.Tensor) -> torch.Tensor:
        """The target itself; for a mixed target, the class with the highest probability."""
        return targets if targets.dim() == 1 else targets.argmax(1)

    def in_top_k(self, scores: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
        """Whether the true class is among the k highest scores, bool ``(B,)``."""
        return (scores.topk(k).indices == self.labels(targets)[:, None]).any(1)

    def training_metrics(self, num_classes: int) -> MetricCollection:
        """Accuracy."""
        # Labels are valid class indices; validating each batch would cost more than the metric.
        return MetricCollection({"accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)})
