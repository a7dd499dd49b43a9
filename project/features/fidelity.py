"""What int8 rows cost in accuracy: a probe on them, beside the same images in full precision."""

from __future__ import annotations

import torch
from torch.nn import functional


def ridge(rows: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float = 1e-2) -> torch.Tensor:
    """Fit a linear classifier in closed form: ridge regression onto one-hot labels.

    Args:
        rows: Features ``(N, D)``, float.
        labels: int64 ``(N,)``.
        classes: Number C of classes.
        penalty: Share of the mean variance that is added to each feature's.

    Returns:
        Weights ``(D + 1, C)``; the last row is the bias.
    """
    inputs = _with_one(rows)
    gram = inputs.T @ inputs
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, inputs.T @ functional.one_hot(labels, classes).to(inputs.dtype))


def compare(
    train: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, exact: torch.Tensor, truth: torch.Tensor
) -> str:
    """Say what rows of less precision do to a probe that is trained on such rows.

    Args:
        train: Rows to train on, ``(N, ...)``; maps are pooled.
        labels: Their classes, int64 ``(N,)``.
        rows: Other images' rows in the precision of ``train``, ``(M, ...)``.
        exact: The same images' rows in full precision.
        truth: Their classes.
    """
    train, rows, exact = _pooled(train), _pooled(rows), _pooled(exact)
    weights = ridge(train, labels, int(labels.max()) + 1)
    guesses, right = ((_with_one(part) @ weights).argmax(1) for part in (rows, exact))
    accuracy, other = ((guess == truth).float().mean() for guess in (guesses, right))
    return (
        f"int8 on {len(rows)} validation images: a probe is right on {accuracy:.3f} of them, {other:.3f} with their rows "
        f"in full precision; the same class on {(guesses == right).float().mean():.3f}, cosine similarity of rows "
        f"{torch.cosine_similarity(rows, exact).mean():.4f}"
    )


def _pooled(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().flatten(2).mean(2) if rows.dim() > 2 else rows.double()


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
