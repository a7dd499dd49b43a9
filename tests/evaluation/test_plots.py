"""Content and legibility of the plots, for 2 to 150 classes."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.classification import multiclass_calibration_error

from project.evaluation import plots
from project.runtime.logger_adapters import MAX_COLORS

COUNTS = [1, 2, 10, 25, 26, 100, 150]
NAMES = ["ants", "Bernese mountain dog of the 1st kind", "$x$ costs $5", "a_b^c", "two\nlines", "犬"]


def class_names(count: int) -> list[str]:
    return [f"{name} {number}" for number, name in zip(range(count), itertools.cycle(NAMES), strict=False)]


def random_matrix(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 5, (count, count)) + 20 * np.eye(count, dtype=int)


def all_figures(count: int) -> dict[str, Figure]:
    names, counts = class_names(count), random_matrix(count)
    values = np.random.default_rng(1).random((3, count))
    scores = dict(zip(("precision", "recall", "f1"), values, strict=True))
    return {
        "counts": plots.confusion(counts, names),
        "shares": plots.confusion(counts, names, normalized=True),
        "per_class": plots.per_class(scores, counts.sum(1), names),
    }


@pytest.mark.parametrize("count", COUNTS)
def test_figures_of_any_number_of_classes_have_a_limited_size(count: int) -> None:
    for figure in all_figures(count).values():
        image = plots.render(figure)
        assert image.mode == "RGB"
        assert 150 < image.width < 1700 and 120 < image.height < 1800
        assert image.getcolors(MAX_COLORS) is not None, "few colours, so that it is logged as a PNG"


@pytest.mark.parametrize("count", [2, 25, 100])
def test_class_labels_do_not_overlap(count: int) -> None:
    for name, figure in all_figures(count).items():
        plots.render(figure)
        axes: Any = figure.axes[0]
        for axis in (axes.yaxis,) if name == "per_class" else (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            assert len(boxes) == count
            side = "x" if axis is axes.xaxis else "y"
            edges = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
            overlaps = [previous[1] - following[0] for previous, following in itertools.pairwise(edges)]
            assert max(overlaps, default=0) < 1, f"{name}: {side} of {count} classes"
            assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)


def test_cells_have_numbers_up_to_25_classes() -> None:
    counts = np.array([[8, 2], [0, 5]])
    texts = [text.get_text() for text in plots.confusion(counts, ["a", "b"]).axes[0].texts]
    assert texts == ["8", "2", "5"], "cells of 0 have no number"
    texts = [text.get_text() for text in plots.confusion(counts, ["a", "b"], normalized=True).axes[0].texts]
    assert texts == ["0.80", "0.20", "1.00"]
    assert len(plots.confusion(random_matrix(25), class_names(25)).axes[0].texts) > 500
    assert not plots.confusion(random_matrix(26), class_names(26)).axes[0].texts


def test_class_without_images_is_drawn() -> None:
    figure = plots.confusion(np.array([[3, 0], [0, 0]]), ["a", "b"], normalized=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00"], "an empty row has no shares"
    assert np.asarray(plots.render(figure)).std() > 0


def test_lowest_f1_is_first_and_at_most_100_classes_are_drawn() -> None:
    scores = {name: np.linspace(0, 1, 150) for name in ("precision", "recall", "f1")}
    axes = plots.per_class(scores, np.arange(150), [f"c{number}" for number in range(150)]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:2] == ["c0 (0)", "c1 (1)"] and len(labels) == 100
    assert "the 100 of 150 with the lowest F1" in axes.get_title(loc="left")


def test_reliability_diagram_shows_the_calibration_error_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(400, 4, generator=generator).pow(4).add(1e-3)
    probabilities /= probabilities.sum(1, keepdim=True)
    labels = torch.randint(0, 4, (400,), generator=generator)
    confidence, predicted = probabilities.max(1)
    figure = plots.reliability(confidence.numpy(), (predicted == labels).numpy())
    expected = float(multiclass_calibration_error(probabilities, labels, 4, n_bins=15))
    assert f"{expected:.3f}" in figure.axes[0].get_title()


def test_gallery_shows_each_image_unscaled_with_its_caption() -> None:
    images = [np.full((96, 96, 3), value, np.uint8) for value in range(10, 80, 10)]
    figure = plots.gallery(images, [f"number {index}\nline" for index in range(7)], "Title")
    assert [text.get_text() for text in figure.texts] == [*(f"number {index}\nline" for index in range(7)), "Title"]
    pixels = np.asarray(plots.render(figure))
    for value in range(10, 80, 10):
        assert (pixels == value).all(2).sum() >= 96 * 96


@pytest.mark.parametrize("caption", ["WWWWWWW…WWWWWW 0.34\ntrue: WWWWWW", "\u72d7" * 14, "ants 0.99"])
def test_captions_of_neighbours_do_not_overlap(caption: str) -> None:
    figure = plots.gallery([np.full((96, 96, 3), 90, np.uint8)] * 6, [caption] * 6, "Title")
    pixels = np.asarray(plots.render(figure))
    ink = (pixels[30 + 96 + 1 :] != 255).any(2)  # below the images
    gaps = [ink[:, x : x + 4] for x in range(16 + 96 + 6, pixels.shape[1] - 16, 96 + 16)]
    assert ink.any() and not any(gap.any() for gap in gaps), "the gap between captions is white"


@pytest.mark.parametrize("name", NAMES)
def test_shortened_name_is_escaped_and_keeps_both_ends(name: str) -> None:
    short = plots.shorten(name, 12)
    assert "\n" not in short and len(short.replace("\\", "")) <= 12
    assert short.replace("\\", "")[0] == name[0] and short[-1] == name[-1]
    assert short.count("$") == short.count(r"\$")


def test_names_that_differ_in_the_middle_get_unique_labels() -> None:
    names = ["ants", *(f"pattern number {n} with a long name" for n in range(12)), "pattern of another kind, long too"]
    for length in (14, 16, 28):
        labels = plots.disambiguate(names, length)
        assert len(set(labels)) == len(names)
        assert labels[0] == "ants" and max(map(len, labels)) <= length + 2


CARS = [
    *(f"Aston Martin {model} {body} 2012" for model in ("V8 Vantage", "Virage") for body in ("Convertible", "Coupe")),
    *(f"Chevrolet Silverado {cab} 2012" for cab in ("1500 Hybrid Crew Cab", "1500 Extended Cab", "2500HD Regular Cab")),
]


@pytest.mark.parametrize("names", [CARS, ["a  b", "a b", "a   b"]])
@pytest.mark.parametrize("length", [12, 14, 16, 20, 24, 28])
def test_groups_of_names_with_the_same_difference_get_unique_labels(names: list[str], length: int) -> None:
    labels = plots.disambiguate(names, length)
    assert len(set(labels)) == len(names)
    assert max(map(len, labels)) <= length + 2


def test_the_curve_of_interpolated_weights_shows_interval_loss_and_choice() -> None:
    alphas = [step / 10 for step in range(11)]
    accuracies, losses = np.linspace(0.8, 0.9, 11).tolist(), np.linspace(0.7, 0.4, 11).tolist()
    figure = plots.interpolation(alphas, accuracies, losses, 200, 0.7, "epoch 3")
    left, right = figure.axes
    (band,) = left.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert low == pytest.approx(0.739, abs=1e-3) and high == pytest.approx(0.934, abs=1e-3)
    assert right.lines[0].get_ydata().tolist() == losses
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["95 % interval (Wilson)", "accuracy", "chosen: 0.7", "loss"]
    assert plots.render(figure).width < 900
