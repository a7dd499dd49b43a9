"""L2-SP: a penalty on the distance between trained and pretrained weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


class L2SP:
    """``alpha / 2 * ||w - w_pretrained||²``, in float32, over the parameters of pretrained stages.

    Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    arXiv:1802.01483. Weight decay pulls the weights towards zero; L2-SP pulls them towards the pretrained ones.

    Args:
        alpha: Strength of the penalty.
        parameters: The parameters by name, with their pretrained values, which are copied.
    """

    def __init__(self, alpha: float, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._alpha = alpha
        self._pretrained = {name: value.detach().to(torch.float32, copy=True) for name, value in parameters}

    def __call__(self, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """The penalty of the current values of the same parameters: a float32 scalar."""
        distances = []
        for name, value in parameters.items():
            pretrained = self._pretrained[name] = self._pretrained[name].to(value.device)
            distances.append((value.float() - pretrained).square().sum())
        return self._alpha / 2 * torch.stack(distances).sum()
