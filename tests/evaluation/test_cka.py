"""Linear CKA against its definition, and its invariances."""

import math

import pytest
import torch

from project.evaluation.cka import linear_cka


def features(seed: int, count: int = 40, width: int = 7) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_it_equals_the_formula_of_the_paper() -> None:
    x, y = features(0), features(1, width=11) + features(0, width=11)
    a, b = ((value - value.mean(0)).double() for value in (x, y))
    norm = torch.linalg.matrix_norm
    expected = norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_it_ignores_rotation_scale_and_shift() -> None:
    x = features(0)
    rotation = torch.linalg.qr(features(2, 7, 7)).Q
    assert linear_cka(x, -3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)


def test_it_is_low_for_unrelated_features_and_symmetric() -> None:
    x, y = features(0, 2000), features(1, 2000)
    assert linear_cka(x, y) < 0.01
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))


def test_small_differences_of_large_features_are_not_lost() -> None:
    """In float32, centering features with a mean of a million would lose them."""
    x = features(0).double()
    assert linear_cka(x + 1e6, x) == pytest.approx(1, abs=1e-6)


def test_equal_features_of_all_images_have_no_similarity() -> None:
    assert math.isnan(linear_cka(torch.ones(5, 3), features(0, 5)))
    assert math.isnan(linear_cka(features(0, 1), features(0, 1)))
