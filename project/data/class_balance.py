"""Compensation of class imbalance: weights in the loss, or of the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Balance = Literal["none", "sampler", "loss"]


@dataclass(frozen=True)
class ClassBalance:
    """How much each class counts in training.

    Attributes:
        mode: ``sampler`` draws each class equally often, ``loss`` weights each class equally in the loss.
        counts: Number of training images of each class.
    """

    mode: Balance
    counts: Sequence[int]

    def _inverse_frequencies(self) -> list[float]:
        """Weights of the classes with a mean of 1 over the images; 0 for a class without images."""
        return [sum(self.counts) / (len(self.counts) * count) if count else 0.0 for count in self.counts]

    @property
    def loss_weights(self) -> list[float] | None:
        """Weight of each class in the loss, ``(C,)``; ``None`` for equal ones."""
        return self._inverse_frequencies() if self.mode == "loss" else None

    @property
    def draws(self) -> torch.Tensor:
        """How often an epoch draws an image of each class on average, float32 ``(C,)``."""
        return torch.tensor(self._inverse_frequencies()) if self.mode == "sampler" else torch.ones(len(self.counts))

    def sampling_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Weight of each image in the sampler, float32 ``(N,)``, given labels ``(N,)``; ``None`` for equal ones."""
        return (1 / torch.tensor(self.counts))[labels] if self.mode == "sampler" else None
