"""Figures from arrays: what they say, and that names stay legible, at 2 and at 100 classes and above."""

import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from project.evaluation import plots
from project.runtime.logger_adapters import MOST_COLOURS

COUNTS = [1, 2, 10, 25, 26, 100, 150]
NAMES = ["ants", "Bernese mountain dog of the 1st kind", "$x$ costs $5", "a_b^c", "two\nlines", "犬"]


def classes(count: int) -> list[str]:
    return [f"{name} {number}" for number, name in zip(range(count), itertools.cycle(NAMES), strict=False)]


def matrix(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 5, (count, count)) + 20 * np.eye(count, dtype=int)


def every(count: int) -> dict[str, Figure]:
    names, counts = classes(count), matrix(count)
    draws = np.random.default_rng(1).random((3, count))
    scores = dict(zip(("precision", "recall", "f1"), draws, strict=True))
    return {
        "counts": plots.confusion(counts, names),
        "shares": plots.confusion(counts, names, normalised=True),
        "each": plots.per_class(scores, counts.sum(1), names),
    }


@pytest.mark.parametrize("count", COUNTS)
def test_figures_of_any_number_of_classes_fit_a_page_and_few_bytes(count: int) -> None:
    for figure in every(count).values():
        picture = plots.picture(figure)
        assert picture.mode == "RGB"
        assert 150 < picture.width < 1700 and 120 < picture.height < 1800
        assert picture.getcolors(MOST_COLOURS) is not None, "it is no photograph, and a PNG of it is small"


@pytest.mark.parametrize("count", [2, 25, 100])
def test_labels_of_classes_do_not_lie_on_each_other(count: int) -> None:
    for name, figure in every(count).items():
        plots.picture(figure)
        axes: Any = figure.axes[0]
        for axis in (axes.yaxis,) if name == "each" else (axes.xaxis, axes.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            assert len(boxes) == count
            side = "x" if axis is axes.xaxis else "y"
            edges = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
            overlaps = [before[1] - after[0] for before, after in itertools.pairwise(edges)]
            assert max(overlaps, default=0) < 1, f"{name}: {side} of {count} classes"
            inside = figure.bbox
            assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= inside.x1 + 1 for box in boxes)


def test_cells_have_numbers_up_to_25_classes() -> None:
    counts = np.array([[8, 2], [0, 5]])
    texts = [text.get_text() for text in plots.confusion(counts, ["a", "b"]).axes[0].texts]
    assert texts == ["8", "2", "5"], "and what never happened is left white"
    texts = [text.get_text() for text in plots.confusion(counts, ["a", "b"], normalised=True).axes[0].texts]
    assert texts == ["0.80", "0.20", "1.00"]
    assert len(plots.confusion(matrix(25), classes(25)).axes[0].texts) > 500
    assert not plots.confusion(matrix(26), classes(26)).axes[0].texts


def test_a_class_without_images_is_drawn() -> None:
    figure = plots.confusion(np.array([[3, 0], [0, 0]]), ["a", "b"], normalised=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00"], "no share of nothing"
    assert np.asarray(plots.picture(figure)).std() > 0


def test_the_worst_classes_are_listed_first_and_of_many_the_worst_alone() -> None:
    scores = {name: np.linspace(0, 1, 150) for name in ("precision", "recall", "f1")}
    axes = plots.per_class(scores, np.arange(150), [f"c{number}" for number in range(150)]).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:2] == ["c0 (0)", "c1 (1)"] and len(labels) == 100
    assert "the 100 of 150 with the lowest F1" in axes.get_title(loc="left")


def test_the_reliability_diagram_says_the_error_of_the_metric() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(400, 4, generator=generator).pow(4).add(1e-3)
    probabilities /= probabilities.sum(1, keepdim=True)
    labels = torch.randint(0, 4, (400,), generator=generator)
    confidence, predicted = probabilities.max(1)
    figure = plots.reliability(confidence.numpy(), (predicted == labels).numpy())
    expected = float(multiclass_calibration_error(probabilities, labels, 4, n_bins=15))
    assert f"{expected:.3f}" in figure.axes[0].get_title()


def test_a_grid_has_each_image_to_the_pixel_with_its_caption() -> None:
    images = [np.full((96, 96, 3), value, np.uint8) for value in range(10, 80, 10)]
    figure = plots.gallery(images, [f"number {at}\nline" for at in range(7)], "All of them")
    assert [text.get_text() for text in figure.texts] == [*(f"number {at}\nline" for at in range(7)), "All of them"]
    shown = np.asarray(plots.picture(figure))
    for value in range(10, 80, 10):
        assert (shown == value).all(2).sum() >= 96 * 96


@pytest.mark.parametrize("caption", ["WWWWWWW…WWWWWW 0.34\ntrue: WWWWWW", "\u72d7" * 14, "ants 0.99"])
def test_captions_of_neighbours_do_not_run_together(caption: str) -> None:
    figure = plots.gallery([np.full((96, 96, 3), 90, np.uint8)] * 6, [caption] * 6, "All of them")
    shown = np.asarray(plots.picture(figure))
    under = (shown[30 + 96 + 1 :] != 255).any(2)  # below the images
    ends = [under[:, x : x + 4].any() for x in range(16 + 96 + 6, shown.shape[1] - 16, 96 + 16)]
    assert under.any() and not any(ends), "there is white between each two"


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_is_no_formula_and_keeps_both_ends(name: str) -> None:
    short = plots.short(name, 12)
    assert "\n" not in short and len(short.replace("\\", "")) <= 12
    assert short.replace("\\", "")[0] == name[0] and short[-1] == name[-1]
    assert short.count("$") == short.count(r"\$")


def test_names_that_differ_in_the_middle_are_told_apart() -> None:
    names = ["ants", *(f"pattern number {n} with a long name" for n in range(12)), "pattern of another kind, long too"]
    for most in (14, 16, 28):
        told = plots.disambiguate(names, most)
        assert len(set(told)) == len(names)
        assert told[0] == "ants" and max(map(len, told)) <= most + 2


CARS = [
    *(f"Aston Martin {model} {body} 2012" for model in ("V8 Vantage", "Virage") for body in ("Convertible", "Coupe")),
    *(f"Chevrolet Silverado {cab} 2012" for cab in ("1500 Hybrid Crew Cab", "1500 Extended Cab", "2500HD Regular Cab")),
]


@pytest.mark.parametrize("names", [CARS, ["a  b", "a b", "a   b"]])
@pytest.mark.parametrize("most", [12, 14, 16, 20, 24, 28])
def test_groups_of_names_that_differ_in_the_same_way_are_told_apart(names: list[str], most: int) -> None:
    told = plots.disambiguate(names, most)
    assert len(set(told)) == len(names)
    assert max(map(len, told)) <= most + 2
