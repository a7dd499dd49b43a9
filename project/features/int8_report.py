"""What int8 rows cost in accuracy: a probe on them, beside the same images in full precision."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from torch.nn import functional

from project.data.sources.base import Source
from project.features.builder import Provided
from project.features.engines import Engine
from project.features.extraction import run
from project.features.row_loader import Rows
from project.features.views import Views, load_image
from project.task import SingleLabel

TRAINED = 2000  # rows that the probe is trained on, at most
COMPARED = 256  # images that are computed in full precision too, at most


def report(
    provided: Provided,
    rows: Rows,
    train: tuple[Views, np.ndarray],
    val: tuple[Views, np.ndarray],
    reference: Callable[[], Engine],
    source: Source,
) -> str:
    """Say what int8 does to accuracy: measured when rows are computed, stored beside them, reported every time.

    Args:
        provided: The int8 rows.
        rows: The same, by place.
        train: Images to train a probe on, and the places of their rows, int ``(N,)``.
        val: Images to compare on, likewise.
        reference: Makes an engine of full precision.
        source: Reads the images.
    """
    about = b"".join(view.key + view.sample.label.to_bytes(4, "little") for view in chain(train[0], val[0]))
    file = provided.option.space.path / f"accuracy-{hashlib.sha256(about).hexdigest()[:16]}.txt"
    if file.exists():
        return file.read_text()
    (trained, at), (compared, other) = (
        (views[:: -(-len(views) // most)], torch.from_numpy(places[:: -(-len(views) // most)].astype(np.int64)))
        for (views, places), most in ((train, TRAINED), (val, COMPARED))
    )
    exact = torch.cat([found for _, found in run(reference(), compared, lambda view: load_image(source, view))])
    labels, truth = (torch.tensor([view.sample.label for view in part]) for part in (trained, compared))
    text = compare(rows[at].cpu(), labels, rows[other].cpu(), exact, truth)
    with contextlib.suppress(OSError):  # of a read-only folder: it is measured again next time
        file.write_text(text)
    return text


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
    weights: torch.Tensor = torch.linalg.solve(gram, inputs.T @ functional.one_hot(labels, classes).to(inputs.dtype))
    return weights


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
    guesses, right = (SingleLabel().answer(_with_one(part) @ weights).label for part in (rows, exact))
    accuracy, other = ((guess == truth).float().mean() for guess in (guesses, right))
    same = (guesses == right).float().mean()
    return (
        f"Features: int8 on {len(rows)} validation images: a probe is right on {accuracy:.3f} of them, and on "
        f"{other:.3f} with rows in full precision; the same class on {same:.3f}, cosine similarity of the rows "
        f"{torch.cosine_similarity(rows, exact).mean():.4f}"
    )


def _pooled(rows: torch.Tensor) -> torch.Tensor:
    return (rows.flatten(2).mean(2, dtype=torch.float32) if rows.dim() > 2 else rows).double()


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
