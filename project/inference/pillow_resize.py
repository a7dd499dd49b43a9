"""Pillow's resize of uint8 images as torch operations, bit for bit, for export.

Pillow computes the weights of the pixels in float64, and rounds them to multiples of 2^-22. Sums are then exact, and
each direction is rounded to uint8. Float64 holds all of these numbers exactly. Source: ``src/libImaging/Resample.c`` of
Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import cast

import torch

from project.errors import ConfigError
from project.preprocessing import Preprocessing

#: Bits of a weight after the binary point: of 32, a pixel needs 8, and sign and sum need 2.
PRECISION_BITS = 32 - 8 - 2
#: Parts of a row that are resampled one after the other, each from the pixels that it depends on.
PARTS = 4

Filter = Callable[[torch.Tensor], torch.Tensor]


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


#: Value of each filter at a distance of ``x >= 0`` pixels.
FILTERS: Mapping[str, Filter] = {"bilinear": _bilinear, "bicubic": _bicubic}
#: Distance from which the value is 0.
SUPPORT = {"bilinear": 1, "bicubic": 2}


def require_filter(preprocessing: Preprocessing) -> None:
    """Check that exported files can resize as the weights require.

    Raises:
        ConfigError: They cannot.
    """
    if preprocessing.interpolation not in FILTERS:
        raise ConfigError(
            f"export: files cannot resize with {preprocessing.interpolation} interpolation. "
            f"Weights with one of these can be exported: {', '.join(FILTERS)}."
        )


def parts_of(length: int, parts: int) -> list[int]:
    """Divide a length into at most so many parts of nearly equal length."""
    parts = min(parts, length)
    return [length * (part + 1) // parts - length * part // parts for part in range(parts)]


def resample(images: torch.Tensor, target: int, start: int, crop: int, interpolation: str) -> torch.Tensor:
    """Resize one dimension of images, and crop it.

    ``torch.export`` can trace the function with dynamic sizes: there are no branches on them.

    Args:
        images: uint8 ``(N, A, S, 3)``; S is resized.
        target: Size to which S is resized.
        start: Start of the crop, of the resized pixels.
        crop: Number of pixels of the crop.
        interpolation: Name of the filter.

    Returns:
        uint8 ``(N, 3, A, crop)``.
    """
    size, sums = images.shape[2], []
    scale = _scalar(size) / _scalar(target)
    stretch = scale.clamp(min=1)
    reach = SUPPORT[interpolation] * stretch
    for begin, end in pairwise(accumulate(parts_of(crop, PARTS), initial=0)):
        centers = (torch.arange(begin, end, dtype=torch.float64) + _scalar(start) + 0.5) * scale
        low = (centers[0] - reach).floor().clamp(min=0).to(torch.int64)
        high = torch.minimum((centers[-1] + reach).ceil(), _scalar(size)).to(torch.int64)
        first, count = cast(int, low.item()), cast(int, (high - low).item())  # symbols while torch.export traces
        torch._check(first >= 0)
        torch._check(count >= 1)
        torch._check(first + count <= size)
        positions = torch.arange(count, dtype=torch.float64) + _scalar(first)
        values = FILTERS[interpolation](((positions[:, None] - centers + 0.5) * (1 / stretch)).abs())
        weights = values / values.sum(0)
        rounded = weights.sign() * (weights.abs() * 2.0**PRECISION_BITS + 0.5).floor()
        pixels = images.narrow(2, first, count).permute(0, 3, 1, 2).contiguous()
        sums.append(pixels.to(torch.float64) @ rounded)
    return (torch.cat(sums, -1) / 2.0**PRECISION_BITS + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _scalar(value: int) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float64)
