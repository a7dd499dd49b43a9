"""Heads: features ``(B, D)`` to logits ``(B, C)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from project.errors import ConfigError, damaged_checkpoint

#: Features, float32 ``(B, D)``, and labels, int64 ``(B,)``, of all training rows; can be iterated several times.
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
#: Constructs a head, given the width D of the features and the number C of classes.
HeadCallable = Callable[[int, int], nn.Module]
NEIGHBOR_ROWS = 8192  # rows to compare at once


@runtime_checkable
class FittedHead(Protocol):
    """A head that is computed from the training rows before the first epoch. All ranks get the same rows."""

    def fit(self, batches: Batches) -> None:
        """Compute the head.

        Args:
            batches: The training rows, all stored views; they can be iterated several times.
        """


@runtime_checkable
class ResizableHead(Protocol):
    """A head whose buffers have the sizes of its training data."""

    def resize(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the buffers the shapes of a saved state, so that it can be loaded.

        Args:
            state: Tensors of the head in a checkpoint, by name.

        Raises:
            CheckpointError: The tensors are invalid.
        """


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

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: int = 512, dropout: float = 0.2) -> None:
        _require(hidden >= 1, f"hidden must be at least 1, not {hidden}.")
        _require(0 <= dropout < 1, f"dropout must be in [0, 1), not {dropout}.")
        super().__init__(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )


class CosineHead(nn.Module):
    """Scaled cosine similarity to one learned vector per class (Gidaris and Komodakis, arXiv:1804.09458).

    Where features are stored, training starts from the class means (imprinting: Qi et al., arXiv:1712.07136).

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        scale: Initial value of the learned factor that multiplies the similarities.

    Raises:
        ConfigError: The scale is out of range.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        _require(0 < scale < math.inf, f"scale must be more than 0 and finite, not {scale}.")
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.scale = nn.Parameter(torch.tensor(scale))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)``."""
        directions = functional.normalize(self.weight, dim=1)
        return self.scale * functional.linear(functional.normalize(features, dim=1), directions)

    def fit(self, batches: Batches) -> None:
        """Set the vector of each class to the mean direction of its training rows."""
        with torch.no_grad():
            self.weight.copy_(mean_directions(batches, *self.weight.shape))


class PrototypeHead(nn.Module):
    """Negative squared distance to the mean of each class (Snell et al., arXiv:1703.05175). It is not trained.

    Features are scaled to unit length first (Wang et al., SimpleShot, arXiv:1911.04623).

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        scale: Factor that multiplies the distances; it changes probabilities, not predictions.

    Raises:
        ConfigError: The scale is out of range.
    """

    means: torch.Tensor

    def __init__(self, in_features: int, num_classes: int, scale: float = 20.0) -> None:
        super().__init__()
        _require(0 < scale < math.inf, f"scale must be more than 0 and finite, not {scale}.")
        self.scale = scale
        self.register_buffer("means", torch.zeros(num_classes, in_features))

    def fit(self, batches: Batches) -> None:
        """Compute the mean of each class."""
        self.means.copy_(mean_directions(batches, *self.means.shape))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)``, float32."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 could not tell near classes apart
            directions = functional.normalize(features.float(), dim=1)
            # The squared length of the features is 1.
            return self.scale * (2 * functional.linear(directions, self.means) - self.means.square().sum(1) - 1)


class KNNHead(nn.Module):
    """Weighted votes of the nearest training rows, as in DINO's evaluation (Caron et al., arXiv:2104.14294).

    A neighbor votes for its class with weight ``exp(cosine similarity / temperature)``. The logits are the logarithms
    of the classes' shares of the votes; one more vote, divided equally among all classes, keeps them finite.

    It is not trained. It stores all training rows in float16: a checkpoint of 1,000 rows of width 2,048 takes 4 MB.

    Args:
        in_features: Width D of the features.
        num_classes: Number C of classes.
        k: Number of neighbors.
        temperature: Temperature of the weights.
        max_rows: Largest number of training rows to store.

    Raises:
        ConfigError: An argument is out of range.
    """

    rows: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, in_features: int, num_classes: int, k: int = 20, temperature: float = 0.07, max_rows: int = 100_000
    ) -> None:
        super().__init__()
        _require(k >= 1, f"k must be at least 1, not {k}.")
        _require(0 < temperature < math.inf, f"temperature must be more than 0 and finite, not {temperature}.")
        _require(max_rows >= 1, f"max_rows must be at least 1, not {max_rows}.")
        self.k, self.temperature, self.max_rows, self.num_classes = k, temperature, max_rows, num_classes
        self.register_buffer("rows", torch.zeros(0, in_features, dtype=torch.float16))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))

    def fit(self, batches: Batches) -> None:
        """Store the training rows.

        Raises:
            ConfigError: There are more than ``max_rows``.
        """
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        count = 0
        for features, labels in batches:
            count += len(labels)
            if count > self.max_rows:
                raise ConfigError(
                    f"model.head: KNNHead would store more than {self.max_rows:,} training rows "
                    f"({2 * features.shape[1] * self.max_rows / 1e6:,.0f} MB). Use fewer images with --data.per_class, "
                    "or increase --model.head.max_rows."
                )
            parts.append((functional.normalize(features, dim=1).half(), labels))
        self.rows, self.labels = (torch.cat(column).to(self.rows.device) for column in zip(*parts, strict=True))

    def resize(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the buffers the shapes of a saved state.

        Raises:
            CheckpointError: The state has no valid labels.
        """
        rows, labels = (state.get(name, torch.empty(0)) for name in ("rows", "labels"))
        if (
            labels.dtype != torch.int64
            or not labels.numel()
            or labels.dim() != 1
            or labels.shape != rows.shape[:1]
            or not 0 <= labels.min() <= labels.max() < self.num_classes
        ):
            raise damaged_checkpoint("The checkpoint is damaged: its KNNHead has no valid rows and labels.")
        count = len(labels)
        self.rows, self.labels = self.rows.new_zeros(count, self.rows.shape[1]), self.labels.new_zeros(count)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)``, float32."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 could not tell near neighbors apart
            similarities, labels = self._neighbors(functional.normalize(features.float(), dim=1))
            count = similarities.shape[1]
            weights = ((similarities - similarities.amax(1, keepdim=True)) / self.temperature).exp()  # no overflow
            shares = weights / weights.sum(1, keepdim=True)
            votes = count * shares.new_zeros(len(features), self.num_classes).scatter_add(1, labels, shares)
            return ((votes + 1 / self.num_classes) / (count + 1)).log()

    def _neighbors(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Similarities and labels ``(B, k)`` of the nearest rows, a part of the rows at a time."""
        nearest, of_nearest = directions[:, :0], self.labels.new_zeros(len(directions), 0)
        for rows, labels in zip(*(torch.split(part, NEIGHBOR_ROWS) for part in (self.rows, self.labels)), strict=True):
            similarities = torch.cat([nearest, directions @ rows.to(directions.dtype).T], 1)
            candidates = torch.cat([of_nearest, labels.expand(len(directions), -1)], 1)
            nearest, places = similarities.topk(min(self.k, similarities.shape[1]), 1)
            of_nearest = candidates.gather(1, places)
        return nearest, of_nearest


def _require(condition: bool, message: str) -> None:
    """Raise a ConfigError if an argument is out of range."""
    if not condition:
        raise ConfigError(message)


def mean_directions(batches: Batches, num_classes: int, width: int) -> torch.Tensor:
    """Mean of the features of each class, each scaled to unit length first; float32 ``(C, D)``.

    Args:
        batches: The training rows.
        num_classes: Number C of classes, each with at least one row.
        width: Width D of the features.
    """
    sums, counts = torch.zeros(num_classes, width, dtype=torch.float64), torch.zeros(num_classes, 1)
    for features, labels in batches:
        sums.index_add_(0, labels.cpu(), functional.normalize(features, dim=1).double().cpu())
        counts.index_add_(0, labels.cpu(), torch.ones(len(labels), 1))
    return (sums / counts).float()
