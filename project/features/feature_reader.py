"""Features of the training images, read from stored rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from project.features.row_loader import RowLoader
from project.models.head_solver import solver_device


class FeatureReader:
    """Reads features of stored training rows.

    Iterating it gives the features, float32 ``(B, D)``, and labels, int64 ``(B,)``, of all views of all images, in
    batches. Each iteration reads them again.

    Args:
        loader: The stored rows.
        refine: Maps rows ``(B, ...)`` to features ``(B, D)``; in evaluation mode.
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
        #: Device of the features.
        self.device = solver_device(model_device)

    def __len__(self) -> int:
        """Number of rows: images times views."""
        return self._loader.view_count * len(self._loader.labels)

    @torch.no_grad()
    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Features, float32 ``(B, D)``, of rows by index ``(B,)``, see :meth:`RowLoader.read`.

        Trainable stages run in small batches.
        """
        parts = torch.split(indices, self._loader.evaluation_batch_size)
        batches = (self._loader.read(part).to(self._model_device, self._dtype) for part in parts)
        return torch.cat([self._refine(rows).float().to(self.device) for rows in batches])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = self._loader.labels
        for indices in torch.split(torch.arange(len(self)), self._loader.evaluation_batch_size):
            yield self.read(indices), labels[indices % len(labels)].to(self.device)
