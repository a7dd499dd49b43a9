"""What a dashboard draws: how well the classifier does, image by image and class by class, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from project.evaluation import plots
from project.evaluation.metrics import class_scores
from project.evaluation.predictions import ValidationPredictions
from project.reporting.thumbnails import Thumbnails, square
from project.runtime.logger_adapters import Points

GRID = 18  # images in a grid
SIDE = 96  # of an image in it, in pixels
MATRIX = 300  # classes; of more, the confusions would take seconds to draw, and nobody could read them
CURVES = 25  # classes that have a precision-recall curve: the most frequent ones
NAME = 14  # characters of a class's name under an image
INPUTS = 12  # training images that are shown as the model sees them
DIMENSIONS = 32  # principal components that are kept of features
SPRITE = 32  # side in pixels of an image in the projector
SECONDS = 2.0  # for reading these, after which there are no more points

Pictures = dict[str, Callable[[], Image.Image]]


def of_outcome(outcome: ValidationPredictions, classes: Sequence[str], thumbnails: Thumbnails | None) -> Pictures:
    """What to draw of an outcome, by name; each is drawn when it is called.

    Args:
        outcome: Of a validation, of at least one image.
        classes: Names of the C classes.
        thumbnails: Of the split; without them there are no grids of images.
    """
    hits, had, got = outcome.by_class(len(classes))
    by_class = {name: values.numpy() for name, values in class_scores(hits, had, got).items()}
    pictures: Pictures = {}
    if len(classes) <= MATRIX:
        matrix = outcome.counts(len(classes)).numpy()
        pictures = {
            "val/confusion_shares": lambda: plots.picture(plots.confusion(matrix, classes, normalised=True)),
            "val/confusion_counts": lambda: plots.picture(plots.confusion(matrix, classes)),
        }
    pictures |= {
        "val/each_class": lambda: plots.picture(plots.per_class(by_class, had.numpy(), classes)),
        "val/reliability": lambda: plots.picture(
            plots.reliability(outcome.confidence.numpy(), outcome.correct.numpy())
        ),
    }
    wrong, mistakes = outcome.mistakes(GRID), int((~outcome.correct).sum())
    if thumbnails is not None:
        read = thumbnails
        if len(wrong):
            few = "All" if len(wrong) == mistakes else f"The {len(wrong)} most confident of"
            pictures["val/mistakes_most_confident"] = lambda: _grid(
                outcome, wrong, classes, read, f"{few} {mistakes} mistakes"
            )
        pictures["val/least_confident"] = lambda: _grid(
            outcome, outcome.doubtful(GRID), classes, read, "Images of the least confidence, right or wrong"
        )
    return pictures


def _grid(
    outcome: ValidationPredictions, which: torch.Tensor, classes: Sequence[str], thumbnails: Thumbnails, title: str
) -> Image.Image:
    captions, names = [], plots.disambiguate(classes, NAME)
    for at in which.tolist():
        true, got = (names[int(labels[at])] for labels in (outcome.labels, outcome.predicted))
        captions.append(f"{got} {outcome.confidence[at]:.2f}\n{'right' if true == got else f'true: {true}'}")
    images = thumbnails.read(outcome.indices[which].tolist(), SIDE)
    return plots.picture(plots.gallery(images, captions, title))


def of_input(images: Sequence[torch.Tensor], captions: Sequence[str], columns: int = 6) -> Image.Image:
    """Training images as the model sees them, but for the normalisation.

    Args:
        images: ``(3, H, W)`` each, uint8 or float in [0, 1].
        captions: One each.
        columns: Images a line.
    """
    shown = [
        (image if image.dtype == torch.uint8 else (image.float() * 255).round().clamp(0, 255).to(torch.uint8))
        .permute(1, 2, 0)
        .cpu()
        .numpy()
        for image in images
    ]
    tiles = [square(Image.fromarray(image), SIDE) for image in shown]
    size = f"{images[0].shape[2]} x {images[0].shape[1]} px"
    return plots.picture(plots.gallery(tiles, captions, f"Training images as the model sees them ({size})", columns))


def curves_of(outcome: ValidationPredictions, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Precision-recall curves of the most frequent classes: whether each image is of it, and the probability."""
    labels = outcome.labels[outcome.probability_indices]
    frequent = torch.bincount(labels, minlength=len(classes)).argsort(descending=True, stable=True)[:CURVES]
    return {
        f"pr/{classes[at]}": ((labels == at).numpy(), outcome.probabilities[:, at].numpy())
        for at in frequent.tolist()
        if (labels == at).any()
    }


def components(features: torch.Tensor) -> torch.Tensor:
    """The principal components of features ``(m, D)``, float64 ``(m, min(m, D, 32))``, with a variance of 1 in all."""
    centred = features.double() - features.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # m is a few hundred, D may be thousands
    most = min(DIMENSIONS, *features.shape)
    kept: torch.Tensor = (vectors * values.clamp(0).sqrt())[:, -most:].flip(1)
    kept /= kept.square().sum(1).mean().sqrt().clamp(1e-12)
    return kept


def points_of(outcome: ValidationPredictions, classes: Sequence[str], thumbnails: Thumbnails | None) -> Points:
    """The images whose features are kept, as points: as many as can be read in two seconds, from all over the split."""
    which = outcome.feature_indices
    mixed = torch.randperm(len(which), generator=torch.Generator().manual_seed(0))  # those that are left out are any
    places = outcome.indices[which[mixed]].tolist()
    squares: list[np.ndarray] = []
    if thumbnails is not None:
        squares = thumbnails.read(places, SPRITE, SECONDS)
        mixed, places = mixed[: len(squares)], places[: len(squares)]
    rows = []
    for at, place in zip(which[mixed].tolist(), places, strict=True):
        true, got = (classes[int(labels[at])] for labels in (outcome.labels, outcome.predicted))
        name = Path(thumbnails.name(place)).name if thumbnails else str(place)
        cells = [true, got, f"{outcome.confidence[at]:.3f}", "right" if true == got else "wrong", name]
        rows.append([" ".join(cell.split()) for cell in cells])
    values = components(outcome.features[mixed]).numpy().round(4)  # in few digits: they are written as text
    sprite = np.stack(squares).transpose(0, 3, 1, 2) if squares else None
    return Points(values, ("class", "predicted", "confidence", "right", "image"), rows, sprite)


def named(labels: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """Training images' classes, for captions; of mixed ones the two largest.

    Args:
        labels: int64 ``(B,)``, or the share of each class, float ``(B, C)``.
        classes: Names of the C classes.
    """
    names = plots.disambiguate(classes, NAME)
    if labels.dim() == 1:
        return [names[label] if label >= 0 else "" for label in labels.tolist()]
    shares, largest = labels.topk(min(2, labels.shape[1]))
    return [
        "\n".join(f"{names[at]} {value:.2f}" for value, at in zip(*of_one, strict=True) if value > 0)
        for of_one in zip(shares.tolist(), largest.tolist(), strict=True)
    ]
