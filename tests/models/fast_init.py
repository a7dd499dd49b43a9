"""Random weights at a fraction of the cost."""

import torch
from torch.overrides import TorchFunctionMode


class FastInit(TorchFunctionMode):
    """Fills weights with repeated noise: drawing random numbers takes most of the time of building a network.

    No two tensors of a network are equal, so that layers in the wrong order are noticed.
    """

    #: Within two standard deviations: trunc_normal_ draws values outside again.
    NOISE = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)

    def __init__(self):
        super().__init__()
        self.filled = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
            weights, *others = args or [kwargs["tensor"]]
            scale = weights[0].numel() ** -0.5 if weights.dim() > 1 else 0.1
            if func is torch.Tensor.normal_ and len(others) == 2:
                scale = min(scale, others[1])
            self.filled += 1
            noise = self.NOISE.roll(1009 * self.filled) * scale
            if func is torch.Tensor.uniform_:  # torch 2.11's trunc_normal_ applies erfinv_, NaN outside [-1, 1]
                noise = noise.clamp(-0.9, 0.9)
            weights.data.view(-1).copy_(noise.repeat(-(-weights.numel() // 2**16))[: weights.numel()])
            return weights
        return func(*args, **(kwargs or {}))
