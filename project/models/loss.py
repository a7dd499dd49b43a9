"""The loss of a batch that several processes share: that of one process with the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist

from project.runtime.distributed import processes
from project.task import Weight


def mean_over_processes(summed: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The mean loss to differentiate.

    DDP averages the gradients of all processes. With means of their own parts, an image in a smaller part would count
    for more. So each process divides by the weight of all parts, and multiplies by the number of processes.

    Args:
        summed: Summed loss of this process's part of the batch.
        weight: Weight of this process's part.
    """
    count = processes()
    if count == 1:
        return summed / weight
    total = torch.as_tensor(weight, dtype=summed.dtype, device=summed.device).clone()
    dist.all_reduce(total)
    return summed * (count / total)
