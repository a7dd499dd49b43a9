"""A heat map over the picture that it is of."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: From nothing to the hottest place: dark violet, red, orange, light yellow. It grows lighter all the way, so that it
#: can be read without seeing colours.
COLOURS = np.array([[20, 5, 70], [140, 20, 100], [225, 75, 45], [250, 160, 20], [252, 250, 165]], np.float32)
MOST = 0.65  # of a pixel that the hottest colour takes


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lay a heat map over a picture, in grey, so that its own colours are not taken for heat.

    Args:
        picture: ``(S, S)`` pixels.
        heat: ``(S, S)`` in [0, 1].
    """
    stops = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(heat, stops, channel) for channel in COLOURS.T], axis=-1)
    share = MOST * heat[..., None]
    pixels = np.asarray(picture.convert("L").convert("RGB"), np.float32) * (1 - share) + colours * share
    return Image.fromarray(pixels.round().astype(np.uint8))
