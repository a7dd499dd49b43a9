"""Figures of how well a classifier does: from arrays to matplotlib's Figure, and from that to a picture.

There is no pyplot here, so no state that figures share, no window, and nothing to close.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from project.evaluation.metrics import BINS, calibration_bins, calibration_error

if TYPE_CHECKING:  # importing it takes a fifth of a second, which a fit spends when there is something to draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
#: Up to so many classes, the cells of a confusion matrix have their numbers.
ANNOTATED = 25
#: Up to so many, each class has a line or a label of its own.
LABELLED = 100


def short(name: str, most: int = 20) -> str:
    """A class's name in one line of so many characters, which matplotlib does not take for a formula."""
    name = " ".join(name.split())
    if len(name) > most:  # many names differ at their end alone
        name = f"{name[: most // 2].rstrip()}…{name[len(name) - (most - 1) // 2 :].lstrip()}"
    return name.replace("$", r"\$")


def disambiguate(names: Sequence[str], most: int) -> list[str]:
    """Classes' names in about so many characters each; those that would look the same show where they differ."""
    shortened = [short(name, most) for name in names]
    for at in _twice(shortened):
        group = [names[place] for place in at]
        before = _alike(group)
        after = min(_alike([name[::-1] for name in group]), min(map(len, group)) - before)
        for place, name in zip(at, group, strict=True):
            differs = short(name[before : len(name) - after], most // 2)
            gap = "" if name[before - 1 : before + 1].isalnum() else " "
            shortened[place] = f"{short(name[:before], max(most - len(differs) - 2, 3))}{gap}{differs}…"
    for at in _twice(shortened):  # of two groups that differ in the same way
        for place in at:
            number = f" #{place + 1}"
            shortened[place] = short(names[place], most - len(number)) + number
    return shortened


def _twice(labels: Sequence[str]) -> list[list[int]]:
    """Where the labels stand that there are more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    return [those for those in places.values() if len(those) > 1]


def _alike(names: Sequence[str]) -> int:
    """With how many characters all of some names begin alike."""
    return sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*names, strict=False)))


def picture(figure: Figure) -> Image.Image:
    """Draw a figure, RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    with _any_script():
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def confusion(counts: np.ndarray, classes: Sequence[str], normalised: bool = False) -> Figure:
    """Confusion matrix.

    Args:
        counts: Images by class, the rows, and by the class that they got, ``(C, C)``.
        classes: Their names.
        normalised: Show the share of each class's images, rather than their number.
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
    values = counts / np.maximum(counts.sum(1, keepdims=True), 1) if normalised else counts
    # Colours follow the root: or else what is right would leave all mistakes white.
    norm = PowerNorm(0.5, 0, 1 if normalised else max(int(counts.max()), 1))
    image = axes.imshow(values, cmap="Blues", norm=norm)
    ticks = np.arange(0, count, math.ceil(count / LABELLED))
    labels = [names[tick] for tick in ticks]
    turned = longest * font * 0.009 > cell * 0.95
    axes.set_xticks(ticks, labels, fontsize=font, rotation=90 if turned else 0)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.set(xlabel="predicted", ylabel="true")
    what, right = "share of each true class" if normalised else "images", int(np.trace(counts))
    axes.set_title(f"Confusion, {what}: {right:,} of {int(counts.sum()):,} right", fontsize=10)
    if count <= ANNOTATED:
        size = min(font, cell * 22)
        for row, column in zip(*np.nonzero(counts), strict=True):
            value = values[row, column]
            text, colour = f"{value:.2f}" if normalised else f"{value}", "white" if norm(value) > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    else:
        figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=MaxNLocator(6, integer=not normalised))
    return figure


def per_class(scores: dict[str, np.ndarray], images: np.ndarray, classes: Sequence[str]) -> Figure:
    """Scores of each class, those with the lowest F1 first; of many classes, the first hundred.

    Args:
        scores: ``precision``, ``recall`` and ``f1`` of each class, ``(C,)``.
        images: Number of each class's images, ``(C,)``.
        classes: Their names.
    """
    order = np.argsort(scores["f1"], kind="stable")[:LABELLED]
    line = float(np.interp(len(order), (2, 10, LABELLED), (0.42, 0.32, 0.155)))
    font = float(np.interp(line, (0.155, 0.32), (7, 9)))
    figure, axes = _blank(7.5, 1.3 + line * len(order))
    lines = np.arange(len(order))
    axes.hlines(lines, 0, 1, colors="#e4e4e4", linewidth=0.8, zorder=0)
    size = (4.5 * font / 7) ** 2
    for name, marker, colour in (("precision", ">", "#d98a00"), ("recall", "<", "#0f7ab8"), ("f1", "o", "#222222")):
        axes.scatter(scores[name][order], lines, s=size, marker=marker, color=colour, label=name, alpha=0.85)
    names = disambiguate([classes[at] for at in order], 28)
    axes.set_yticks(lines, [f"{name} ({images[at]:,})" for name, at in zip(names, order, strict=True)], fontsize=font)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(order) - 0.4, -0.6))
    which = "" if len(order) == len(classes) else f", the {len(order)} of {len(classes)} with the lowest F1"
    axes.set_title(f"Each class (images){which}", fontsize=10, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False, handletextpad=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def reliability(confidence: np.ndarray, correct: np.ndarray) -> Figure:
    """Reliability diagram (Guo et al., arXiv:1706.04599): how often predictions are right that are made with p.

    Args:
        confidence: Probability of the predicted class, ``(N,)``.
        correct: Whether it is the right one, ``(N,)``.
    """
    from matplotlib.figure import Figure

    bins = calibration_bins(torch.from_numpy(confidence), torch.from_numpy(correct))
    error = float(calibration_error(bins))
    count, mean, accuracy = bins.numpy().T
    mean, accuracy = (each / np.maximum(count, 1) for each in (mean, accuracy))
    figure = Figure(figsize=(5, 5.6), dpi=DPI)  # laid out by hand: there are no names of unknown length
    places = {"left": 0.13, "right": 0.97, "top": 0.94, "bottom": 0.15, "hspace": 0.18}
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), gridspec_kw=places)
    middle, width = (np.arange(BINS) + 0.5) / BINS, 1 / BINS
    there = count > 0
    upper.bar(middle[there], accuracy[there], width, color="#8fc1e3", edgecolor="white", label="accuracy")
    upper.plot(mean[there], accuracy[there], "o", color="#222222", markersize=3, label="at the mean confidence")
    upper.plot([0, 1], [0, 1], color="#d98a00", linestyle="--", linewidth=1, label="as it should be")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    upper.set_title(f"Reliability: expected calibration error {error:.3f}", fontsize=10)
    lower.bar(middle, count, width, color="#999999", edgecolor="white")
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def gallery(images: Sequence[np.ndarray], captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Images in a grid, with a caption of one or two lines under each.

    Args:
        images: uint8 ``(side, side, 3)`` each, all of one size.
        captions: One each.
        title: Above them.
        columns: Images a line.
    """
    columns = min(columns, max(len(images), 3))
    side = images[0].shape[0]
    lines = math.ceil(len(images) / columns)
    gap, top = 16, 30
    caption = 14 + 13 * max(text.count("\n") for text in captions)
    width, height = columns * (side + gap) + gap, top + lines * (side + caption + gap)
    mosaic = np.full((height, width, 3), 255, np.uint8)
    corners = [
        (top + at // columns * (side + caption + gap), gap + at % columns * (side + gap)) for at in range(len(images))
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
        written = figure.text((x + side / 2) / width, 1 - (y + side + 3) / height, text, **style)
        for size in (7.5, 7, 6, 5, 4, 3):  # the largest that keeps clear of its neighbours
            written.set_fontsize(size)
            with _any_script():
                if written.get_window_extent(canvas.get_renderer()).width <= side + gap / 2:
                    break
    figure.text(gap / width, 1 - 8 / height, title, fontsize=10, va="top")
    return figure


@contextmanager
def _any_script() -> Iterator[None]:
    """Without a warning of names in scripts that matplotlib's font has not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with axes that leave room for their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()
