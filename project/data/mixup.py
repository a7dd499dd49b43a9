"""Batches whose images are mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2

from project.data.dataset import ImageBatch
from project.data.transforms import SeededRandom


class BatchMixer:
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

    def __call__(self, batch: ImageBatch, seed: int) -> ImageBatch:
        """Mix the valid images of a batch, uint8 ``(B, 3, H, W)`` with targets ``(B,)``, as the seed says.

        Returns:
            Images, float in [0, 1], and the share of each class, float ``(B, C)``; padding has none.
        """
        images, labels, valid = batch
        assert isinstance(labels, torch.Tensor) and isinstance(valid, torch.Tensor)
        mixed, shares = images.float() / 255, torch.zeros(len(labels), self._classes, device=labels.device)
        if valid.any():
            with SeededRandom(seed):
                mixed[valid], shares[valid] = self._mix(mixed[valid], labels[valid])
        return ImageBatch(mixed, shares, valid)
