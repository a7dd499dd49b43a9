"""Figures of a dashboard: validation results per image and per class, training inputs, and projector points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from project.evaluation import plots
from project.evaluation.confusion import class_counts, confusion_matrix
from project.evaluation.metrics import class_scores
from project.evaluation.predictions import ValidationPredictions
from project.reporting.thumbnails import Thumbnails, center_square
from project.runtime.logger_adapters import EmbeddingPoints

GRID_IMAGES = 18
TILE_SIZE = 96  # pixels per side of an image in a grid
INPUT_IMAGES = 12
CAPTION_LENGTH = 14  # characters of a class name under an image
MAX_MATRIX_CLASSES = 300  # a larger confusion matrix takes seconds to draw and is unreadable
MAX_CURVES = 25  # precision-recall curves, of the most frequent classes
MAX_COMPONENTS = 32  # principal components per projector point
SPRITE_SIZE = 32  # pixels per side of a thumbnail in the projector
SPRITE_SECONDS = 2.0  # time limit for reading these thumbnails


Drawings = dict[str, Callable[[], Image.Image]]


def validation_figures(
    predictions: ValidationPredictions, classes: Sequence[str], thumbnails: Thumbnails | None
) -> Drawings:
    """Functions that draw the figures of a validation, by tag.

    Args:
        predictions: Predictions of at least one image.
        classes: Names of the C classes.
        thumbnails: Thumbnails of the split; without them there are no image grids.
    """
    true_positives, support, predicted = class_counts(predictions.labels, predictions.predicted, len(classes))
    scores = {name: values.numpy() for name, values in class_scores(true_positives, support, predicted).items()}
    figures: Drawings = {}
    if len(classes) <= MAX_MATRIX_CLASSES:
        matrix = confusion_matrix(predictions.labels, predictions.predicted, len(classes)).numpy()
        figures = {
            "val/confusion_shares": lambda: plots.render(plots.confusion(matrix, classes, normalized=True)),
            "val/confusion_counts": lambda: plots.render(plots.confusion(matrix, classes)),
        }
    figures |= {
        "val/each_class": lambda: plots.render(plots.per_class(scores, support.numpy(), classes)),
        "val/reliability": lambda: plots.render(
            plots.reliability(predictions.confidence.numpy(), predictions.correct.numpy())
        ),
    }
    if thumbnails is None:
        return figures
    images, names = thumbnails, plots.disambiguate(classes, CAPTION_LENGTH)

    def grid(selected: torch.Tensor, title: str) -> Image.Image:
        captions = []
        for row in selected.tolist():
            true, predicted = (names[int(labels[row])] for labels in (predictions.labels, predictions.predicted))
            verdict = "correct" if true == predicted else f"true: {true}"
            captions.append(f"{predicted} {predictions.confidence[row]:.2f}\n{verdict}")
        tiles = images.read(predictions.indices[selected].tolist(), TILE_SIZE)
        return plots.render(plots.gallery(tiles, captions, title))

    errors, count = predictions.most_confident_errors(GRID_IMAGES), int((~predictions.correct).sum())
    if count:
        title = f"All {count} errors" if len(errors) == count else f"The {len(errors)} most confident of {count} errors"
        figures["val/mistakes_most_confident"] = lambda: grid(errors, title)
    figures["val/least_confident"] = lambda: grid(
        predictions.least_confident(GRID_IMAGES), "Images with the lowest confidence"
    )
    return figures


def input_grid(images: Sequence[torch.Tensor], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Grid of training images as the model receives them, before normalization.

    Args:
        images: ``(3, H, W)`` each, uint8 or float in [0, 1].
        captions: One per image.
        columns: Images per line.
    """
    arrays = [
        (image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255).to(torch.uint8))
        .permute(1, 2, 0)
        .cpu()
        .numpy()
        for image in images
    ]
    tiles = [center_square(Image.fromarray(array), TILE_SIZE) for array in arrays]
    size = f"{images[0].shape[2]} x {images[0].shape[1]} px"
    return plots.render(plots.gallery(tiles, captions, f"Training images as the model receives them ({size})", columns))


def precision_recall_curves(
    predictions: ValidationPredictions, classes: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Data of precision-recall curves, by tag, of the most frequent classes.

    Returns:
        For each class whether an image is of the class, bool ``(n,)``, and its predicted probability, float32 ``(n,)``.
    """
    labels = predictions.labels[predictions.probability_indices]
    frequent = torch.bincount(labels, minlength=len(classes)).argsort(descending=True, stable=True)[:MAX_CURVES]
    return {
        f"pr/{classes[label]}": ((labels == label).numpy(), predictions.probabilities[:, label].numpy())
        for label in frequent.tolist()
        if (labels == label).any()
    }


def principal_components(features: torch.Tensor) -> torch.Tensor:
    """First principal components of features ``(m, D)``, float64 ``(m, min(m, D, 32))``, scaled to total variance 1."""
    centered = features.double() - features.double().mean(0)
    # The Gram matrix: m is a few hundred, D may be thousands.
    values, vectors = torch.linalg.eigh(centered @ centered.T)
    count = min(MAX_COMPONENTS, *features.shape)
    components: torch.Tensor = (vectors * values.clamp(0).sqrt())[:, -count:].flip(1)
    components /= components.square().sum(1).mean().sqrt().clamp(1e-12)
    return components


def embedding_points(
    predictions: ValidationPredictions, classes: Sequence[str], thumbnails: Thumbnails | None
) -> EmbeddingPoints:
    """Projector points of the images with features: as many as can be read within the time limit."""
    candidates = predictions.feature_indices
    # In random order, so that the images read within the time limit are a random subset.
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))
    indices = predictions.indices[candidates[order]].tolist()
    images: list[np.ndarray] = []
    if thumbnails is not None:
        images = thumbnails.read(indices, SPRITE_SIZE, SPRITE_SECONDS)
        order, indices = order[: len(images)], indices[: len(images)]
    rows = []
    for row, index in zip(candidates[order].tolist(), indices, strict=True):
        true, predicted = (classes[int(labels[row])] for labels in (predictions.labels, predictions.predicted))
        name = Path(thumbnails.name(index)).name if thumbnails else str(index)
        verdict = "right" if true == predicted else "wrong"
        cells = [true, predicted, f"{predictions.confidence[row]:.3f}", verdict, name]
        rows.append([" ".join(cell.split()) for cell in cells])
    values = (
        principal_components(predictions.features[order]).numpy().round(4)
    )  # rounded, because they are written as text
    sprite = np.stack(images).transpose(0, 3, 1, 2) if images else None
    return EmbeddingPoints(values, ("class", "predicted", "confidence", "right", "image"), rows, sprite)


def class_captions(labels: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """Class names as captions; for mixed images (MixUp, CutMix) the two largest shares.

    Args:
        labels: Class indices, int64 ``(B,)``, or shares of the classes, float ``(B, C)``.
        classes: Names of the C classes.
    """
    names = plots.disambiguate(classes, CAPTION_LENGTH)
    if labels.dim() == 1:
        return [names[label] if label >= 0 else "" for label in labels.tolist()]
    shares, indices = labels.topk(min(2, labels.shape[1]))
    return [
        "\n".join(f"{names[index]} {share:.2f}" for share, index in zip(*row, strict=True) if share > 0)
        for row in zip(shares.tolist(), indices.tolist(), strict=True)
    ]
