"""The loss of a batch that several processes share: what one process would make of the whole of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.nn import functional

Weight = torch.Tensor | int


def processes() -> int:
    """How many share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> tuple[torch.Tensor, Weight]:
    """Cross-entropy, not yet divided.

    Args:
        logits: ``(B, C)``; B may be 0.
        labels: int64 ``(B,)``, or the share of each class, float ``(B, C)``.
        weights: Of each class ``(C,)``.
        smoothing: Share of each label that is spread over all classes.

    Returns:
        Its sum, and what torch divides that by for the mean: the number of images, or the weights of their classes.
    """
    summed = functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="sum")
    return summed, len(labels) if weights is None or labels.dim() > 1 else weights[labels].sum()


def shared(summed: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The loss to take the gradient of.

    DDP takes the mean of the processes' gradients. With means of their own parts, an image in a smaller part would
    count for more; so each divides by the weight of all parts, and multiplies by their number.

    Args:
        summed: Of this process's part of the batch.
        weight: Of this process's part.
    """
    count = processes()
    if count == 1:
        return summed / weight
    total = torch.as_tensor(weight, dtype=summed.dtype, device=summed.device).clone()
    dist.all_reduce(total)
    return summed * (count / total)


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
