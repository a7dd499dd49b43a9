"""Build a backbone and load its weights."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from project.errors import ModelError
from project.models import weights as weight_files
from project.models.backbone import Backbone, Origin
from project.models.registry import Architecture, architecture
from project.models.stages import split_into_stages

RANDOM_SEED = 0  # fixed, because checkpoints do not contain frozen weights, random ones included


def load_backbone(name: str, weights: str | None = "IMAGENET1K_V1", image_size: int | None = None) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.
        weights: A name of the zoo, a file, ``pkg:NAME`` of an installed package, or ``None`` for random weights.
        image_size: Image size in pixels; ``None`` for that of the weights.

    Raises:
        ModelError: Unknown backbone, or unsupported image size.
        WeightsError: The weights are unknown, missing, modified, unsafe, or of another network.
    """
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size must be at least 1, not {image_size}.")
    arch = architecture(name)
    state, origin = _read(weights, arch)
    origin = replace(origin, image_size=image_size)
    with torch.random.fork_rng(devices=[]), SkipRandomInit() if state is not None else nullcontext():
        torch.manual_seed(RANDOM_SEED)
        model, output_dim = arch.build(state)
    preprocessing = arch.preprocessing(weights)
    fixed_size = arch.fixed_size(model)
    if fixed_size:
        if image_size not in (None, fixed_size):
            raise ModelError(f"model.image_size: {name} supports only images of {fixed_size} px, not {image_size}.")
        preprocessing = preprocessing.with_image_size(fixed_size)
    preprocessing = preprocessing.with_image_size(image_size)
    backbone = Backbone(name, split_into_stages(model), output_dim, preprocessing, origin)
    if image_size is not None:
        _validate_image_size(backbone, image_size)
    return backbone


class SkipRandomInit(TorchFunctionMode):
    """Context in which random initialization has no effect, for networks whose weights are loaded afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of a random initialization unchanged."""
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _validate_image_size(backbone: Backbone, image_size: int) -> None:
    """Run one black image, because no table says which sizes a network supports."""
    mode = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"model.image_size: {backbone.name} does not support images of {image_size} px ({reason}). Change the size."
        ) from error
    finally:
        backbone.train(mode)


def _read(weights: str | None, arch: Architecture) -> tuple[weight_files.State | None, Origin]:
    if weights is None:
        warnings.warn(
            f"model.weights is null: {arch.name} has random weights, so its features are random too.", stacklevel=3
        )
        return None, Origin(None, f"random, seed {RANDOM_SEED}")
    if weights.startswith("pkg:"):
        path = weight_files.from_package(weights.removeprefix("pkg:"))
        state = weight_files.in_order(weight_files.read_state(path), arch.reference(), weights)
        return state, Origin(weights, f"{weights}/{path.name}")
    if weight_files.is_file_name(weights):
        path = weight_files.from_file(weights)
        return weight_files.read_state(path), Origin(str(path.resolve()), path.name)
    path = arch.fetch(weights)
    return weight_files.read_state(path), Origin(weights, path.name, weight_files.repository_of(path))
