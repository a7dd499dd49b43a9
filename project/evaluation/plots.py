"""Evaluation plots: arrays to matplotlib figures, and figures to images.

Uses matplotlib without pyplot, so there is no global state and no figure to close.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from project.evaluation.confidence_intervals import wilson
from project.evaluation.metrics import BINS, calibration_bins, calibration_error

if TYPE_CHECKING:  # importing matplotlib takes 0.2 s, so the functions import it on demand
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
BLUE, ORANGE = "#0f7ab8", "#d98a00"
#: Maximum number of classes for numbers in the cells of a confusion matrix.
ANNOTATED = 25
#: Maximum number of classes that are all labeled.
LABELLED = 100


def shorten(name: str, length: int) -> str:
    """Shorten a class name to one line of at most ``length`` characters, and escape it for matplotlib."""
    name = " ".join(name.split())
    if len(name) > length:  # keep both ends: many names differ only at the end
        name = f"{name[: length // 2].rstrip()}…{name[len(name) - (length - 1) // 2 :].lstrip()}"
    return name.replace("$", r"\$")


def disambiguate(names: Sequence[str], length: int) -> list[str]:
    """Shorten class names to unique labels of about ``length`` characters."""
    labels = [shorten(name, length) for name in names]
    for duplicates in _duplicates(labels):  # show the part in which the names differ
        group = [names[index] for index in duplicates]
        prefix = _common_prefix_length(group)
        suffix = _common_prefix_length([name[::-1] for name in group])
        suffix = min(suffix, min(map(len, group)) - prefix)
        for index, name in zip(duplicates, group, strict=True):
            difference = shorten(name[prefix : len(name) - suffix], length // 2)
            gap = "" if name[prefix - 1 : prefix + 1].isalnum() else " "
            labels[index] = f"{shorten(name[:prefix], max(length - len(difference) - 2, 3))}{gap}{difference}…"
    for duplicates in _duplicates(labels):  # from groups with the same difference
        for index in duplicates:
            number = f" #{index + 1}"
            labels[index] = shorten(names[index], length - len(number)) + number
    return labels


def _duplicates(labels: Sequence[str]) -> list[list[int]]:
    """Indices of equal labels, for each label that occurs more than once."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        indices[label].append(index)
    return [group for group in indices.values() if len(group) > 1]


def _common_prefix_length(names: Sequence[str]) -> int:
    columns = zip(*names, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda characters: len(set(characters)) == 1, columns))


def render(figure: Figure) -> Image.Image:
    """Render a figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    with _ignore_missing_glyphs():
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def confusion(counts: np.ndarray, classes: Sequence[str], normalized: bool = False) -> Figure:
    """Plot a confusion matrix.

    Args:
        counts: Images by true class (row) and predicted class (column), ``(C, C)``.
        classes: Class names.
        normalized: Normalize each row to a sum of 1.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    count = len(classes)
    names = disambiguate(classes, 24 if count <= 10 else 16)
    longest = max(map(len, names))
    cell = float(np.interp(count, (2, 5, 10, 25, LABELLED), (1.1, 0.8, 0.55, 0.36, 0.125)))
    side = min(count, LABELLED) * cell
    font = float(np.interp(cell, (0.125, 0.36, 0.8), (5.5, 8, 10)))
    margin = 0.7 + longest * font * 0.0085
    figure, axes = _blank(max(side, 2.4) + margin + 0.9, max(side, 2.4) + margin + 0.5)
    values = counts / np.maximum(counts.sum(1, keepdims=True), 1) if normalized else counts
    # A square-root color scale keeps rare errors visible beside the diagonal.
    norm = PowerNorm(0.5, 0, 1 if normalized else max(int(counts.max()), 1))
    image = axes.imshow(values, cmap="Blues", norm=norm)
    ticks = np.arange(0, count, math.ceil(count / LABELLED))
    labels = [names[tick] for tick in ticks]
    too_wide = longest * font * 0.009 > cell * 0.95
    axes.set_xticks(ticks, labels, fontsize=font, rotation=90 if too_wide else 0)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    unit, correct = "share of each true class" if normalized else "images", int(np.trace(counts))
    axes.set_title(f"Confusion, {unit}: {correct:,} of {int(counts.sum()):,} correct", fontsize=10)
    if count <= ANNOTATED:
        size = min(font, cell * 22)
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = values[row, column]
            text, color = f"{value:.2f}" if normalized else f"{value}", "white" if norm(value) > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    else:
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=MaxNLocator(6, integer=not normalized))
    return figure


def per_class(scores: dict[str, np.ndarray], images: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plot precision, recall and F1 of each class, lowest F1 first, at most 100 classes.

    Args:
        scores: ``precision``, ``recall`` and ``f1`` of each class, ``(C,)``.
        images: Number of images of each class, ``(C,)``.
        classes: Class names.
    """
    order = np.argsort(scores["f1"], kind="stable")[:LABELLED]
    line = float(np.interp(len(order), (2, 10, LABELLED), (0.42, 0.32, 0.155)))
    font = float(np.interp(line, (0.155, 0.32), (7, 9)))
    figure, axes = _blank(7.5, 1.3 + line * len(order))
    lines = np.arange(len(order))
    axes.hlines(lines, 0, 1, colors="#e4e4e4", linewidth=0.8, zorder=0)
    size = (4.5 * font / 7) ** 2
    for name, marker, color in (("precision", ">", ORANGE), ("recall", "<", BLUE), ("f1", "o", "#222222")):
        axes.scatter(scores[name][order], lines, s=size, marker=marker, color=color, label=name, alpha=0.85)
    names = disambiguate([classes[index] for index in order], 28)
    labels = [f"{name} ({images[index]:,})" for name, index in zip(names, order, strict=True)]
    axes.set_yticks(lines, labels, fontsize=font)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(order) - 0.4, -0.6))
    selection = "" if len(order) == len(classes) else f", the {len(order)} of {len(classes)} with the lowest F1"
    axes.set_title(f"Scores per class (images){selection}", fontsize=10, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False, handletextpad=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def reliability(confidence: np.ndarray, correct: np.ndarray) -> Figure:
    """Plot a reliability diagram: accuracy per confidence bin (Guo et al., arXiv:1706.04599).

    Args:
        confidence: Probability of the predicted class, ``(N,)``.
        correct: Whether the prediction is correct, ``(N,)``.
    """
    from matplotlib.figure import Figure

    bins = calibration_bins(torch.from_numpy(confidence), torch.from_numpy(correct))
    error = float(calibration_error(bins))
    count, mean, accuracy = bins.numpy().T
    mean, accuracy = (total / np.maximum(count, 1) for total in (mean, accuracy))
    figure = Figure(figsize=(5, 5.6), dpi=DPI)  # fixed layout: no labels of unknown length
    layout = {"left": 0.13, "right": 0.97, "top": 0.94, "bottom": 0.15, "hspace": 0.18}
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), gridspec_kw=layout)
    middle, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    filled = count > 0
    upper.bar(middle[filled], accuracy[filled], width, color="#8fc1e3", edgecolor="white", label="accuracy")
    upper.plot(mean[filled], accuracy[filled], "o", color="#222222", markersize=3, label="at the mean confidence")
    upper.plot([0, 1], [0, 1], color=ORANGE, linestyle="--", linewidth=1, label="perfect calibration")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    upper.set_title(f"Reliability: expected calibration error {error:.3f}", fontsize=10)
    lower.bar(middle, count, width, color="#999999", edgecolor="white")
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def gallery(images: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Plot images in a grid with captions of one or two lines.

    Args:
        images: uint8 ``(side, side, 3)`` each, all of the same size.
        captions: Caption of each image.
        title: Title of the figure.
        columns: Images per row.
    """
    columns = min(columns, max(len(images), 3))
    side = images[0].shape[0]
    lines = math.ceil(len(images) / columns)
    gap, top = 16, 30
    caption = 14 + 13 * max(text.count("\n") for text in captions)
    width, height = columns * (side + gap) + gap, top + lines * (side + caption + gap)
    mosaic = np.full((height, width, 3), 255, np.uint8)
    corners = [
        (top + index // columns * (side + caption + gap), gap + index % columns * (side + gap))
        for index in range(len(images))
    ]
    for image, (y, x) in zip(images, corners, strict=True):
        mosaic[y : y + side, x : x + side] = image
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(mosaic, origin="upper")
    canvas: Any = FigureCanvasAgg(figure)
    style: dict[str, Any] = {"va": "top", "ha": "center", "linespacing": 1.15}
    for text, (y, x) in zip(captions, corners, strict=True):
        label = figure.text((x + side / 2) / width, 1 - (y + side + 3) / height, text, **style)
        for size in (7.5, 7, 6, 5, 4, 3):  # the largest font that does not overlap the neighbours
            label.set_fontsize(size)
            with _ignore_missing_glyphs():
                if label.get_window_extent(canvas.get_renderer()).width <= side + gap / 2:
                    break
    figure.text(gap / width, 1 - 8 / height, title, fontsize=10, va="top")
    return figure


def sweep(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the accuracy of a sweep's trials against their learning rate; solved heads are horizontal lines.

    Args:
        trials: Each with ``head``, ``features``, ``lr`` (a number, or ``solved``) and ``accuracy``.
    """
    figure, axes = _blank(7.5, 4.5)
    trained = [trial for trial in trials if trial["lr"] != "solved"]
    heads = [*dict.fromkeys(trial["head"] for trial in trained)]
    kinds = [*dict.fromkeys(trial["features"] for trial in trials)]
    colors = dict(zip(kinds, itertools.cycle((BLUE, ORANGE, "#2f8f4e", "#8a4fa3")), strict=False))
    markers = dict(zip(heads, itertools.cycle("os^Dvx"), strict=False))
    for head, kind in itertools.product(heads, kinds):
        chosen = [trial for trial in trained if (trial["head"], trial["features"]) == (head, kind)]
        if chosen:
            points = [[trial[name] for trial in chosen] for name in ("lr", "accuracy")]
            label = f"{shorten(head, 30)}, {kind}"
            axes.scatter(points[0], points[1], s=26, marker=markers[head], color=colors[kind], alpha=0.6, label=label)
    for trial in trials:
        if trial["lr"] == "solved":
            color, label = colors[trial["features"]], f"solved, {trial['features']}"
            axes.axhline(trial["accuracy"], color=color, linewidth=1, linestyle="--", label=label)
    if trained:
        axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="accuracy on held-out training images")
    axes.set_title(f"{len(trials)} candidates", fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def learning_rates(rates: np.ndarray, changes: np.ndarray, chosen: float) -> Figure:
    """Plot a learning-rate range test.

    Args:
        rates: Learning rates ``(N,)``.
        changes: Change of the loss at each of them ``(N,)``.
        chosen: The chosen rate.
    """
    figure, axes = _blank(6.5, 4)
    axes.plot(rates, changes, color=BLUE)
    axes.axvline(chosen, color=ORANGE, linewidth=1, linestyle="--", label=f"chosen: {chosen:g}")
    axes.set_xscale("log")
    depth = max(-float(changes.min()), 0.01)
    axes.set_ylim(-1.5 * depth, 3 * depth)  # the rise after the descent is many times higher
    axes.set(xlabel="learning rate", ylabel="change of the training loss")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def interpolation(
    alphas: Sequence[float], accuracies: Sequence[float], losses: Sequence[float], images: int, chosen: float, end: str
) -> Figure:
    """Plot accuracy, with its 95 % interval, and loss of weights between the start and the end of a fit.

    Args:
        alphas: Weights of the end.
        accuracies: Accuracy for each alpha.
        losses: Loss for each alpha.
        images: Number of validation images.
        chosen: The chosen alpha.
        end: Name of the end, such as "epoch 3".
    """
    figure, axes = _blank(7.5, 4.5)
    low, high = zip(*(wilson(accuracy * images, images) for accuracy in accuracies), strict=True)
    axes.fill_between(alphas, low, high, color=BLUE, alpha=0.15, linewidth=0, label="95 % interval (Wilson)")
    axes.plot(alphas, accuracies, "o-", color=BLUE, markersize=4, label="accuracy")
    axes.axvline(chosen, color="#999999", linestyle="--", linewidth=1, label=f"chosen: {chosen}")
    right = axes.twinx()
    right.plot(alphas, losses, "s-", color=ORANGE, markersize=3, label="loss")
    axes.set(xlabel=f"alpha: 0 is the start of the fit, 1 is {end}", ylabel="val/accuracy")
    right.set_ylabel("val/loss")
    axes.set_title(f"Interpolated weights on {images:,} validation images", fontsize=10, loc="left")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    for part in (axes, right):
        part.spines["top"].set_visible(False)
    return figure


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """Suppress warnings about characters that matplotlib's font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of the given size in inches, and axes that leave room for their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()
