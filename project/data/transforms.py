"""From a read image to the uint8 tensor that a backbone takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode, v2

from project.errors import ConfigError
from project.preprocessing import Preprocessing

#: A transform: an RGB image to uint8 ``(3, H, W)``. Normalisation is the backbone's, on its own device.
Transform = Callable[[Image.Image], torch.Tensor]

Augment = Literal["none", "flip", "standard"]


def _chain(*steps: Callable[..., Any]) -> Transform:
    transform: Transform = v2.Compose(steps)  # torchvision has no types
    return transform


def evaluation(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter edge and crop the centre, as the weights ask: uint8 ``(3, crop, crop)``."""
    size = [preprocessing.resize] * (2 if preprocessing.squash else 1)
    return _chain(
        v2.Resize(size, InterpolationMode(preprocessing.interpolation), antialias=True),
        v2.CenterCrop(preprocessing.crop),
        v2.PILToTensor(),
    )


def training(preprocessing: Preprocessing, augment: Augment) -> Transform:
    """The evaluation transform, augmented.

    Args:
        preprocessing: What the weights ask for.
        augment: ``none``; ``flip``: left and right swapped half of the time; ``standard``: a random crop of 35 to
            100 % of the area, and the flip.

    Raises:
        ConfigError: Another name.
    """
    if augment not in get_args(Augment):
        raise ConfigError(f"data.augment: {augment!r} is none of {', '.join(get_args(Augment))}.")
    if augment == "none":
        return evaluation(preprocessing)
    flip = v2.RandomHorizontalFlip()
    if augment == "flip":
        return _chain(flip, evaluation(preprocessing))
    crop = v2.RandomResizedCrop(
        preprocessing.crop,
        scale=(0.35, 1.0),
        interpolation=InterpolationMode(preprocessing.interpolation),
        antialias=True,
    )
    return _chain(crop, flip, v2.PILToTensor())


class Drawn(TorchFunctionMode):
    """Within it, what this thread draws from torch's random numbers comes from a seed of its own.

    So one image can be augmented the same way again, whatever other threads draw meanwhile: torchvision's transforms
    know the global generator alone.

    Args:
        seed: Of the generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in DRAWING:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)


#: The functions of torch that draw, as torchvision's transforms use them.
DRAWING = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.multinomial, torch.bernoulli),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.bernoulli_),
}
