"""Features of the training images, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from project.models.head_solver import solver_device


class RowSource(Protocol):
    """Rows of the training images: stored ones, or features that were computed for the solver."""

    @property
    def view_count(self) -> int:
        """Number V of views per image."""

    @property
    def labels(self) -> torch.Tensor:
        """Label of each image, int64 ``(N,)``, in the order of the split."""

    @property
    def evaluation_batch_size(self) -> int:
        """Number of rows per batch when no gradient is computed."""

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows ``(B, ...)`` by index, int64 ``(B,)``: index ``v * N + n`` is view v of image n."""


class FeatureReader:
    """Reads features of training rows.

    Iterating it gives the features, float32 ``(B, D)``, and labels, int64 ``(B,)``, of all views of all images, in
    batches. Each iteration reads them again.

    Args:
        rows: The rows.
        refine: Maps rows ``(B, ...)`` to features ``(B, D)``; in evaluation mode.
        model_device: Device of ``refine``.
        dtype: Type of its inputs.
    """

    def __init__(
        self,
        rows: RowSource,
        refine: Callable[[torch.Tensor], torch.Tensor],
        model_device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self._refine, self._model_device, self._dtype = rows, refine, model_device, dtype
        #: Device of the features.
        self.device = solver_device(model_device)

    def __len__(self) -> int:
        """Number of rows: images times views."""
        return self.rows.view_count * len(self.rows.labels)

    @torch.no_grad()
    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Features, float32 ``(B, D)``, of rows by index ``(B,)``, see :meth:`RowSource.read`.

        Trainable stages run in small batches.
        """
        parts = torch.split(indices, self.rows.evaluation_batch_size)
        batches = (self.rows.read(part).to(self._model_device, self._dtype) for part in parts)
        return torch.cat([self._refine(rows).float().to(self.device) for rows in batches])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = self.rows.labels
        for indices in torch.split(torch.arange(len(self)), self.rows.evaluation_batch_size):
            yield self.read(indices), labels[indices % len(labels)].to(self.device)
