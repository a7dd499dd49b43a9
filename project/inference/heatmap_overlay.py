"""Overlay of a heat map on its image."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Color map from 0 to 1: dark violet, red, orange, light yellow. Lightness increases monotonically, so the map is
#: readable in greyscale and by color-blind people.
COLORS = np.array([[20, 5, 70], [140, 20, 100], [225, 75, 45], [250, 160, 20], [252, 250, 165]], np.float32)
MAX_OPACITY = 0.65


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Blend a heat map over a greyscale copy of an image, so that only the heat map has color.

    Args:
        image: ``(S, S)`` pixels.
        heat: ``(S, S)`` in [0, 1].
    """
    stops = np.linspace(0, 1, len(COLORS))
    colors = np.stack([np.interp(heat, stops, channel) for channel in COLORS.T], axis=-1)
    opacity = MAX_OPACITY * heat[..., None]
    pixels = np.asarray(image.convert("L").convert("RGB"), np.float32) * (1 - opacity) + colors * opacity
    return Image.fromarray(pixels.round().astype(np.uint8))
