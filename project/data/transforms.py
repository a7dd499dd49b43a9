"""Transforms: from a decoded image to the uint8 tensor that a backbone takes."""

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

MIN_AREA = 0.35  # smallest random crop, as a fraction of the image area
#: A JPEG is decoded at a reduced size of at least this multiple of the resized image's size.
MARGIN = 2
#: Pillow's filter of each interpolation.
FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.NEAREST_EXACT: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
    InterpolationMode.BOX: Image.Resampling.BOX,
    InterpolationMode.HAMMING: Image.Resampling.HAMMING,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Transform:
    """Transforms an RGB image to uint8 ``(3, H, W)``. The backbone normalizes, on its own device.

    Attributes:
        steps: The transform.
        min_size: Smallest shorter side of a decoded image, in pixels; 0 decodes at full size.
        description: Identifies the transform in the keys of stored features.
    """

    steps: Callable[[Image.Image], torch.Tensor]
    min_size: int
    description: str

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Transform an image.

        Raises:
            ConfigError: A transform in ``data.augment`` failed.
        """
        try:
            return self.steps(image)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data.augment failed on an image of {image.width}x{image.height} pixels: {error}"
            ) from error

    def __repr__(self) -> str:
        return f"{self.description}, decoded at {self.min_size}"


def _chain(min_size: int, *steps: Callable[..., Any]) -> Transform:
    chain = v2.Compose(steps)
    return Transform(chain, min_size, repr(chain))


class Resize(v2.Resize):  # type: ignore[misc]  # torchvision has no types
    """Resize that gives the same pixels with every version of Pillow, and in exported files.

    Pillow resizes in one direction after the other, and rounds in between. Before version 13, it always began with the
    horizontal direction; since then, the order depends on the sizes.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image; tensors, which custom transforms may return, are resized by torchvision."""
        if not isinstance(inpt, Image.Image):
            return super().transform(inpt, params)
        assert self.size is not None
        shorter, scaled = min(inpt.size), self.size[0]
        width, height = self.size[::-1] if len(self.size) == 2 else [scaled * side // shorter for side in inpt.size]
        resampling = FILTERS[InterpolationMode(self.interpolation)]
        return inpt.resize((width, inpt.height), resampling).resize((width, height), resampling)


def _evaluation_steps(preprocessing: Preprocessing) -> list[Callable[..., Any]]:
    size = [preprocessing.resize] * (2 if preprocessing.squash else 1)
    return [
        Resize(size, InterpolationMode(preprocessing.interpolation), antialias=True),
        v2.CenterCrop(preprocessing.crop),
        v2.PILToTensor(),
    ]


def evaluation(preprocessing: Preprocessing) -> Transform:
    """The evaluation transform of the weights: resize and center crop to uint8 ``(3, crop, crop)``."""
    return _chain(MARGIN * preprocessing.resize, *_evaluation_steps(preprocessing))


def training(
    preprocessing: Preprocessing, augment: Augment | Sequence[Mapping[str, Any] | Callable[..., Any]]
) -> Transform:
    """The transform of training images.

    Args:
        preprocessing: Preprocessing of the weights.
        augment: ``none``: the evaluation transform; ``flip``: a random horizontal flip, then the evaluation transform;
            ``standard``: a random crop of 35 to 100 % of the area, the flip, and brightness, contrast and saturation
            changed by up to 20 %; ``trivial``: the crop, the flip, and TrivialAugmentWide (Mueller and Hutter, 2021);
            ``rand``: the crop, the flip, and RandAugment (Cubuk et al., 2019). Or a list of torchvision.transforms.v2
            transforms, as objects or as ``class_path`` and ``init_args``, applied before the evaluation transform.

    Raises:
        ConfigError: The name is unknown, or a transform cannot be pickled.
    """
    if not isinstance(augment, str):
        return _custom(preprocessing, augment)
    if augment not in get_args(Augment):
        raise ConfigError(f"data.augment: unknown value {augment!r}. Available: {', '.join(get_args(Augment))}.")
    if augment == "none":
        return evaluation(preprocessing)
    flip = v2.RandomHorizontalFlip()
    if augment == "flip":
        return _chain(MARGIN * preprocessing.resize, flip, *_evaluation_steps(preprocessing))
    interpolation = InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(preprocessing.crop, scale=(MIN_AREA, 1.0), interpolation=interpolation, antialias=True)
    color: dict[str, Callable[..., Any]] = {
        "standard": v2.ColorJitter(0.2, 0.2, 0.2),
        "trivial": v2.TrivialAugmentWide(interpolation=interpolation),
        "rand": v2.RandAugment(interpolation=interpolation),
    }
    min_size = math.ceil(MARGIN * preprocessing.crop / math.sqrt(MIN_AREA))
    return _chain(min_size, crop, flip, color[augment], v2.PILToTensor())


def _custom(preprocessing: Preprocessing, transforms: Sequence[Mapping[str, Any] | Callable[..., Any]]) -> Transform:
    augmentation = [
        ClassSpec.from_dict(transform, "data.augment").construct("data.augment", nn.Module)
        if isinstance(transform, Mapping)
        else transform
        for transform in transforms
    ]
    steps = [*augmentation, *_evaluation_steps(preprocessing)]
    try:  # the repr of a transform may lack parameters
        digest = hashlib.sha256(pickle.dumps(steps)).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"data.augment: {error}. Use classes and functions that are defined in a module.") from error
    return Transform(v2.Compose(steps), 0, f"{v2.Compose(steps)!r} {digest}")


class SeededRandom(TorchFunctionMode):
    """Within this context, torch's random functions draw from a generator with a given seed, in this thread only.

    It makes augmentation reproducible while other threads draw random numbers. torchvision's transforms take no
    generator argument.

    Args:
        seed: Seed of the generator.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in LIKE_FUNCTIONS:
            return LIKE_FUNCTIONS[func](args[0].shape, generator=self._generator, dtype=args[0].dtype, **kwargs)
        if func in RANDOM_FUNCTIONS:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)


#: The random functions of torch that torchvision's transforms use.
RANDOM_FUNCTIONS = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.multinomial, torch.bernoulli),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.bernoulli_),
    *(torch._sample_dirichlet, torch._standard_gamma),
}
#: Those without a generator argument, and their replacements.
LIKE_FUNCTIONS = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
