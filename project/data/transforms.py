"""From a read image to the uint8 tensor that a backbone takes."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import InterpolationMode, v2

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.preprocessing import Preprocessing

Augment = Literal["none", "flip", "standard", "trivial", "rand"]

AUGMENT = "data.augment"  # the key, for messages
AREA = 0.35  # of an image, at least, that a random crop takes


@dataclass(frozen=True)
class Transform:
    """From an RGB image to uint8 ``(3, H, W)``. Normalisation is the backbone's, on its own device.

    Attributes:
        steps: What is done.
        min_size: Pixels that the shorter side needs; an image may be decoded at a smaller size that has them.
        described: What tells it from all other transforms.
    """

    steps: Callable[[Image.Image], torch.Tensor]
    min_size: int
    described: str

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform an image.

        Raises:
            ConfigError: A transform of the user's cannot.
        """
        try:
            return self.steps(image)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data.augment cannot transform an image of {image.width}x{image.height} pixels: {error}"
            ) from error

    def __repr__(self) -> str:
        return f"{self.described}, decoded at {self.min_size}"


def _chain(min_size: int, *steps: Callable[..., Any]) -> Transform:
    chain = v2.Compose(steps)
    return Transform(chain, min_size, repr(chain))


def _evaluation_steps(preprocessing: Preprocessing) -> list[Callable[..., Any]]:
    size = [preprocessing.resize] * (2 if preprocessing.squash else 1)
    return [
        v2.Resize(size, InterpolationMode(preprocessing.interpolation), antialias=True),
        v2.CenterCrop(preprocessing.crop),
        v2.PILToTensor(),
    ]


def evaluation(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter edge and crop the centre, as the weights ask: uint8 ``(3, crop, crop)``."""
    return _chain(MARGIN * preprocessing.resize, *_evaluation_steps(preprocessing))


#: Times as many pixels as the resized image has, that a decoder's own reduction has to leave.
MARGIN = 2


def training(
    preprocessing: Preprocessing, augment: Augment | Sequence[Mapping[str, Any] | Callable[..., Any]]
) -> Transform:
    """The evaluation transform, augmented.

    Args:
        preprocessing: What the weights ask for.
        augment: ``none``; ``flip``: left and right swapped half of the time; ``standard``: a random crop of 35 to
            100 % of the area, the flip, and brightness, contrast and saturation changed by up to a fifth; ``trivial``:
            the crop, the flip, and TrivialAugmentWide (Mueller and Hutter, 2021); ``rand``: the crop, the flip, and
            RandAugment (Cubuk and others, 2019). Or transforms of torchvision's v2, themselves or by ``class_path`` and
            ``init_args``, which come before the evaluation transform.

    Raises:
        ConfigError: Another name; transforms that cannot be told from others.
    """
    if not isinstance(augment, str):
        return _own(preprocessing, augment)
    if augment not in get_args(Augment):
        raise ConfigError(f"data.augment: {augment!r} is none of {', '.join(get_args(Augment))}.")
    if augment == "none":
        return evaluation(preprocessing)
    flip = v2.RandomHorizontalFlip()
    if augment == "flip":
        return _chain(MARGIN * preprocessing.resize, flip, *_evaluation_steps(preprocessing))
    interpolation = InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(preprocessing.crop, scale=(AREA, 1.0), interpolation=interpolation, antialias=True)
    colour: dict[str, Callable[..., Any]] = {
        "standard": v2.ColorJitter(0.2, 0.2, 0.2),
        "trivial": v2.TrivialAugmentWide(interpolation=interpolation),
        "rand": v2.RandAugment(interpolation=interpolation),
    }
    min_size = math.ceil(MARGIN * preprocessing.crop / math.sqrt(AREA))
    return _chain(min_size, crop, flip, colour[augment], v2.PILToTensor())


def _own(preprocessing: Preprocessing, transforms: Sequence[Mapping[str, Any] | Callable[..., Any]]) -> Transform:
    made = [
        ClassSpec.from_dict(one, "data.augment").construct("data.augment", nn.Module)
        if isinstance(one, Mapping)
        else one
        for one in transforms
    ]
    steps = [*made, *_evaluation_steps(preprocessing)]
    try:  # a transform's repr need not have all that it does
        described = hashlib.sha256(pickle.dumps(steps)).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"data.augment: {error}. Use classes and functions of a module.") from error
    return Transform(v2.Compose(steps), 0, f"{v2.Compose(steps)!r} {described}")


class SeededRandom(TorchFunctionMode):
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
        if func in LIKE:
            return LIKE[func](args[0].shape, generator=self._generator, dtype=args[0].dtype, **kwargs)
        if func in DRAWING:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)


#: The functions of torch that draw, as torchvision's transforms use them.
DRAWING = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.multinomial, torch.bernoulli),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.bernoulli_),
    *(torch._sample_dirichlet, torch._standard_gamma),
}
#: Those that take no generator, and the ones to use in their place.
LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
