"""Similarity of two sets of features of the same images."""

from __future__ import annotations

import torch


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """Linear centered kernel alignment of two sets of features.

    It is 1 if the features are equal up to a rotation, a translation and a scaling, and near 0 if they are unrelated.
    All sums are float64, on the CPU. Time and memory grow with the square of N.

    Source: S. Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv:1905.00414.

    Args:
        first: Features of N images, ``(N, D)``.
        second: Features of the same images, ``(N, E)``.

    Returns:
        The similarity, in [0, 1]; NaN if all images have the same features, as with a single image.
    """
    kernels = []
    for features in (first, second):
        centered = features.detach().cpu().double()
        centered = centered - centered.mean(0)
        kernels.append(centered @ centered.T)
    x, y = kernels
    return float(((x * y).sum() / (x.norm() * y.norm())).clamp(0, 1))  # rounding may exceed 1
