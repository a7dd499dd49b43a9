"""MixUp and CutMix of training batches."""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from project.data.dataset import ImageBatch
from project.data.transforms import SeededRandom


class BatchMixer:
    """Applies MixUp (Zhang et al., 2018) or CutMix (Yun et al., 2019) to a batch; with both, one at random.

    Args:
        classes: Number of classes.
        mixup: Alpha of MixUp's Beta distribution; 0 disables it.
        cutmix: Alpha of CutMix's Beta distribution; 0 disables it.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float) -> None:
        self._classes = classes
        enabled = [(transform, alpha) for transform, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
        self._mix = v2.RandomChoice([transform(alpha=alpha, num_classes=classes) for transform, alpha in enabled])

    def __call__(self, batch: ImageBatch, seed: int) -> ImageBatch:
        """Mix the valid images of a batch.

        Args:
            batch: Images, uint8 ``(B, 3, H, W)``, and labels, int64 ``(B,)``.
            seed: Determines the result.

        Returns:
            Images, float in [0, 1], and class probabilities, float ``(B, C)``; those of padding are 0.
        """
        images, labels, valid = batch
        assert isinstance(labels, torch.Tensor) and isinstance(valid, torch.Tensor)
        mixed, targets = images.float() / 255, torch.zeros(len(labels), self._classes, device=labels.device)
        if valid.any():
            with SeededRandom(seed):
                mixed[valid], targets[valid] = self._mix(mixed[valid], labels[valid])
        return ImageBatch(mixed, targets, valid)
