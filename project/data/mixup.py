"""Batches whose images are mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

from project.data.samplers import IGNORED
from project.data.transforms import Drawn


class Mix:
    """Batches whose images are mixed: MixUp (Zhang and others, 2018), CutMix (Yun and others, 2019), or either.

    Args:
        classes: How many there are.
        mixup: Parameter of the Beta distribution that MixUp's share is drawn from; 0 for none.
        cutmix: The same of CutMix.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float) -> None:
        self._classes = classes
        ways: list[Callable[..., Any]] = []
        if mixup:
            ways.append(v2.MixUp(alpha=mixup, num_classes=classes))
        if cutmix:
            ways.append(v2.CutMix(alpha=cutmix, num_classes=classes))
        self._mix = v2.RandomChoice(ways)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix images ``(B, 3, H, W)``, uint8, with labels ``(B,)``, as the seed says.

        Returns:
            Images, float in [0, 1], and the share of each class, float ``(B, C)``; of what is to be ignored, none.
        """
        mixed, shares = images.float() / 255, torch.zeros(len(labels), self._classes, device=labels.device)
        counts = labels != IGNORED
        if counts.any():
            with Drawn(seed):
                mixed[counts], shares[counts] = self._mix(mixed[counts], labels[counts])
        return mixed, shares
