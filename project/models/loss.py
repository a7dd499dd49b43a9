"""The loss of a batch that several processes share: what one process would make of the whole of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import functional

from project.runtime.distributed import processes

Weight = torch.Tensor | int


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
