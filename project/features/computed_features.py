"""Features of the training images that are not stored: computed once and held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

ROWS_PER_READ = 4096


@dataclass(frozen=True)
class ComputedFeatures:
    """Features of consecutive training images; a :class:`~project.features.feature_reader.RowSource`.

    Attributes:
        features: Features of the M images that are held, float32 ``(M, D)``.
        labels: Label of each training image, int64 ``(N,)``, in the order of the split.
        first: Index of the first of these images: a rank may hold only its part.
    """

    features: torch.Tensor
    labels: torch.Tensor
    first: int = 0

    view_count = 1
    evaluation_batch_size = ROWS_PER_READ

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Features, float32 ``(B, D)``, of images by index, int64 ``(B,)``."""
        return self.features[(indices - self.first).to(self.features.device)]


@torch.no_grad()
def compute_features(
    batches: Iterable[Any],
    extract: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    model_device: torch.device,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Compute the features of images.

    Args:
        batches: Batches whose first item is images, uint8 ``(B, 3, H, W)``.
        extract: Maps images to features ``(B, D)``; in evaluation mode.
        width: D.
        model_device: Device of ``extract``.
        device: Device of the result.
        on_progress: Called with the number of images that are done.

    Returns:
        float32 ``(N, D)``.
    """
    parts, done = [torch.empty(0, width, device=device)], 0
    for images, *_ in batches:
        parts.append(extract(images.to(model_device, non_blocking=True)).float().to(device))
        done += len(images)
        on_progress(done)
    return torch.cat(parts)
