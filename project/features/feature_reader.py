"""Features of the training images, read from stored rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from project.features.row_loader import RowLoader


class FeatureReader:
    """Reads features of stored training rows.

    Iterating it gives the features ``(B, D)`` and labels ``(B,)`` of all views of all images, in batches. Each
    iteration reads them again.

    Args:
        loader: The stored rows.
        refine: Maps rows to features; in evaluation mode.
        model_device: Device of ``refine``.
        dtype: Type of its inputs.
    """

    def __init__(
        self,
        loader: RowLoader,
        refine: Callable[[torch.Tensor], torch.Tensor],
        model_device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._loader, self._refine, self._model_device, self._dtype = loader, refine, model_device, dtype
        #: Device of the features: MPS has no float64.
        self.device = torch.device("cpu") if model_device.type == "mps" else model_device

    def __len__(self) -> int:
        """Number of rows: images times views."""
        return self._loader.view_count * len(self._loader.labels)

    @torch.no_grad()
    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Features of rows by index, see :meth:`RowLoader.read`, float32; trainable stages run in small batches."""
        parts = torch.split(indices, self._loader.evaluation_batch_size)
        batches = (self._loader.read(part).to(self._model_device, self._dtype) for part in parts)
        return torch.cat([self._refine(rows).float().to(self.device) for rows in batches])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = self._loader.labels
        for indices in torch.split(torch.arange(len(self)), self._loader.evaluation_batch_size):
            yield self.read(indices), labels[indices % len(labels)].to(self.device)
