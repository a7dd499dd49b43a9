"""Accuracy cost of int8 rows: a linear probe on them, compared with the same images in full precision."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch.nn import functional

from project.data.sources.base import Source
from project.features.builder import BuildResult
from project.features.engines import Engine
from project.features.extraction import compute_rows
from project.features.row_loader import Rows
from project.features.views import Views, load_image
from project.task import SingleLabel

MAX_TRAIN_ROWS = 2000
MAX_COMPARED_IMAGES = 256


def report(
    built: BuildResult,
    rows: Rows,
    train: tuple[Views, np.ndarray],
    val: tuple[Views, np.ndarray],
    reference: Callable[[], Engine],
    source: Source,
) -> str:
    """Describe the accuracy cost of int8, measured once and saved beside the rows.

    Args:
        built: Where the int8 rows are stored.
        rows: The int8 rows.
        train: Images to train a probe on, and the indices of their rows, int ``(N,)``.
        val: Images to compare on, likewise.
        reference: Builds an engine in full precision.
        source: Reads the images.
    """
    identity = b"".join(view.key + view.sample.label.to_bytes(4, "little") for view in chain(train[0], val[0]))
    file = built.option.space.path / f"accuracy-{hashlib.sha256(identity).hexdigest()[:16]}.txt"
    if file.exists():
        return file.read_text()
    train_views, train_index = _subset(*train, MAX_TRAIN_ROWS)
    val_views, val_index = _subset(*val, MAX_COMPARED_IMAGES)
    computed = compute_rows(reference(), val_views, lambda view: load_image(source, view))
    exact = torch.cat([batch for _, batch in computed])
    train_labels, val_labels = (torch.tensor([view.sample.label for view in part]) for part in (train_views, val_views))
    text = compare(rows[train_index].cpu(), train_labels, rows[val_index].cpu(), exact, val_labels)
    with contextlib.suppress(OSError):  # read-only folder: measured again next time
        file.write_text(text)
    return text


def _subset(views: Views, index: np.ndarray, limit: int) -> tuple[Views, torch.Tensor]:
    """At most ``limit`` evenly spaced views, and the indices of their rows."""
    step = -(-len(views) // limit)
    return views[::step], torch.from_numpy(index[::step].astype(np.int64))


def ridge(rows: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float = 1e-2) -> torch.Tensor:
    """Fit a linear classifier in closed form: ridge regression onto one-hot labels.

    Args:
        rows: Features ``(N, D)``, float.
        labels: int64 ``(N,)``.
        classes: Number C of classes.
        penalty: Regularization strength, relative to the mean variance of the features.

    Returns:
        Weights ``(D + 1, C)``; the last row is the bias.
    """
    inputs = _append_one(rows)
    gram = inputs.T @ inputs
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights: torch.Tensor = torch.linalg.solve(gram, inputs.T @ functional.one_hot(labels, classes).to(inputs.dtype))
    return weights


def compare(
    train_rows: torch.Tensor,
    train_labels: torch.Tensor,
    val_rows: torch.Tensor,
    exact_rows: torch.Tensor,
    val_labels: torch.Tensor,
) -> str:
    """Describe the effect of int8 on a linear probe that is trained on int8 rows.

    Args:
        train_rows: int8 rows of training images, ``(N, ...)``; feature maps are average-pooled.
        train_labels: Their labels, int64 ``(N,)``.
        val_rows: int8 rows of validation images, ``(M, ...)``.
        exact_rows: Rows of the same images in full precision.
        val_labels: Their labels.
    """
    train_rows, val_rows, exact_rows = _pooled(train_rows), _pooled(val_rows), _pooled(exact_rows)
    weights = ridge(train_rows, train_labels, int(train_labels.max()) + 1)
    int8, exact = (SingleLabel().predict(_append_one(part) @ weights).label for part in (val_rows, exact_rows))
    int8_accuracy, exact_accuracy = ((labels == val_labels).float().mean() for labels in (int8, exact))
    return (
        f"Features: linear probe accuracy on {len(val_rows)} validation images: {int8_accuracy:.3f} with int8, "
        f"{exact_accuracy:.3f} in full precision; same prediction on {(int8 == exact).float().mean():.3f}; "
        f"cosine similarity of the rows {torch.cosine_similarity(val_rows, exact_rows).mean():.4f}"
    )


def _pooled(rows: torch.Tensor) -> torch.Tensor:
    return (rows.flatten(2).mean(2, dtype=torch.float32) if rows.dim() > 2 else rows).double()


def _append_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
