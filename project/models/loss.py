"""Mean loss of a batch that is distributed over several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from project.runtime.distributed import world_size
from project.task import Weight


def global_mean_loss(summed: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Scale this rank's loss so that DDP's averaged gradient is that of the mean over the global batch.

    DDP averages gradients over ranks. If each rank used its local mean, images of smaller local batches would weigh
    more. So each rank divides by the global weight and multiplies by the world size.

    Args:
        summed: Summed loss of the local batch.
        weight: Weight of the local batch.
    """
    ranks = world_size()
    if ranks == 1:
        return summed / weight
    total = torch.as_tensor(weight, dtype=summed.dtype, device=summed.device).clone()
    dist.all_reduce(total)
    return summed * (ranks / total)
