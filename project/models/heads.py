"""Heads: features ``(B, D)`` to logits ``(B, C)``."""

from __future__ import annotations

import torch
from torch import nn


class LinearHead(nn.Linear):
    """Linear classifier, the article's replacement of ``fc``.

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        bias: Whether to add a bias.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__(in_features, num_classes, bias=bias)


class MLPHead(nn.Sequential):
    """MLP with layer normalization, one hidden layer and dropout.

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        hidden: Width of the hidden layer.
        dropout: Dropout probability of the hidden layer.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: int = 512, dropout: float = 0.2) -> None:
        super().__init__(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )


class CosineHead(nn.Module):
    """Scaled cosine similarity to one learned vector per class (Gidaris and Komodakis, arXiv:1804.09458).

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        scale: Initial value of the learned factor that multiplies the similarities.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.scale = nn.Parameter(torch.tensor(scale))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)``."""
        directions = nn.functional.normalize(self.weight, dim=1)
        return self.scale * nn.functional.linear(nn.functional.normalize(features, dim=1), directions)
