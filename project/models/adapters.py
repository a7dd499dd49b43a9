"""Adapters: train a small part of the stages after the cut, and leave their other tensors as pretrained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from project.errors import ConfigError, join_names

AdapterName = Literal["none", "bias", "norm", "lora"]
DEFAULT_RANK = 8
#: Names of the weights that LoRA adapts, by the class of their module. Attention of torch fuses q, k and v in a tensor.
ADAPTED_WEIGHTS: dict[type[nn.Module], str] = {
    nn.Linear: "weight",
    nn.Conv2d: "weight",
    nn.MultiheadAttention: "in_proj_weight",
}


def _attach_nothing(stages: Mapping[str, nn.Module]) -> None:
    """For adapters that train parameters of the network itself."""


@dataclass(frozen=True)
class Adapter:
    """Selects the parameters that are trained in the stages after the cut.

    Attributes:
        description: Name and settings, for logs and checkpoints.
        trains: Whether a parameter is trained, given the module that owns it and its name in this module.
        attach: Adds parameters to stages in place, given the stages by name.
    """

    description: str
    trains: Callable[[nn.Module, str], bool]
    attach: Callable[[Mapping[str, nn.Module]], None] = _attach_nothing

    def trained(self, stage: nn.Module) -> set[str]:
        """Names of the trained parameters of a stage."""
        return {
            f"{path}.{name}".lstrip(".")
            for path, module in stage.named_modules(remove_duplicate=False)
            for name, _ in module.named_parameters(recurse=False)
            if self.trains(module, name)
        }


class LowRankUpdate(nn.Module):
    """Adds the product of two small matrices to a weight: LoRA (Hu et al., arXiv:2106.09685).

    A weight ``(out, in, h, w)`` of a convolution is treated as a matrix ``(out, in * h * w)``. The product starts at
    zero. It is not scaled: LoRA's ``alpha`` equals the rank.

    Args:
        weight: The pretrained weight ``(out, ...)``.
        rank: Rank R of the product; it is limited to that of the weight.

    Attributes:
        down: Trained matrix ``(R, in * h * w)``, in the dtype of the weight.
        up: Trained matrix ``(out, R)``, in the dtype of the weight.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update, of the same shape and dtype."""
        return weight + (self.up @ self.down).view_as(weight)


def _attach_updates(rank: int, targets: Sequence[str], stages: Mapping[str, nn.Module]) -> None:
    """Add low-rank updates to the weights of stages, see :func:`make_adapter`; no targets are the default ones."""
    layers = {
        f"{stage_name}.{path}": (module, weight)
        for stage_name, stage in stages.items()
        for path, module in stage.named_modules()
        for kind, weight in ADAPTED_WEIGHTS.items()
        if isinstance(module, kind) and getattr(module, weight) is not None
    }
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            raise ConfigError(
                f"model.lora_targets: no linear layer or convolution of {', '.join(stages)} is called {target!r}. "
                f"Use parts of names such as {join_names([*layers][-3:])}."
            )
    # The random state is restored, so that the head gets the same initial weights as without updates.
    with torch.random.fork_rng(devices=[]):
        for name, (module, weight) in layers.items():
            # An update of a grouped convolution, such as a depthwise one, is hardly smaller than its weight.
            by_default = not targets and getattr(module, "groups", 1) == 1
            if by_default or any(_matches(name, target) for target in targets):
                parametrize.register_parametrization(module, weight, LowRankUpdate(getattr(module, weight), rank))


def _matches(name: str, target: str) -> bool:
    """Whether a layer's name contains a target as a whole part: ``attn.qkv`` contains ``qkv``, but not ``q``."""
    # Not a regular expression: an untrusted checkpoint could contain one that takes exponential time.
    return f".{target}." in f".{name}."


#: Adapters that train parameters of the network itself.
ADAPTERS: dict[str, Adapter | None] = {
    "none": None,
    "bias": Adapter("bias", lambda module, name: name.endswith("bias")),
    # By name, because timm's normalization layers have no common base class with those of torch.
    "norm": Adapter("norm", lambda module, name: "norm" in type(module).__name__.lower()),
}


def make_adapter(name: AdapterName, rank: int | None = None, targets: Sequence[str] | None = None) -> Adapter | None:
    """Create an adapter.

    Args:
        name: ``bias`` trains all biases (BitFit, Ben Zaken et al., arXiv:2106.10199), ``norm`` the affine parameters of
            normalization layers, ``lora`` a :class:`LowRankUpdate` of each target; ``none`` is no adapter.
        rank: Rank of the updates; 8 by default.
        targets: Layers to update: parts of their names, such as ``qkv`` or ``layer4.0``. By default all linear layers
            and all convolutions that are not grouped.

    Returns:
        The adapter; ``None`` if all parameters are trained.

    Raises:
        ConfigError: The rank is out of range, or settings of LoRA are given without it.
    """
    if name == "lora":
        if rank is not None and rank < 1:
            raise ConfigError(f"model.lora_rank must be at least 1, not {rank}.")
        if targets is not None and not all(targets):
            raise ConfigError("model.lora_targets has an empty name. Remove it.")
        rank = DEFAULT_RANK if rank is None else rank
        of_targets = f" in {', '.join(targets)}" if targets else ""
        return Adapter(
            f"lora of rank {rank}{of_targets}",
            lambda module, name: isinstance(module, LowRankUpdate),
            partial(_attach_updates, rank, targets or ()),
        )
    for key, value in (("lora_rank", rank), ("lora_targets", targets)):
        if value is not None:
            raise ConfigError(
                f"model.{key} has no effect with model.adapter {name}. Remove it, or use --model.adapter lora."
            )
    return ADAPTERS[name]


def merge_updates(stage: nn.Module) -> nn.Module:
    """Copy a stage as plain layers, whose weights include the low-rank updates.

    Args:
        stage: A stage with or without updates; it is not changed.

    Returns:
        A stage without parametrizations that shares no tensors with the given one.
    """
    merged = copy.deepcopy(stage)
    for module in [*merged.modules()]:
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            weights = {
                name: torch.empty_like(updates.get_parameter("original")).copy_(getattr(module, name).detach())
                for name, updates in module.parametrizations.items()  # empty_like keeps the strides
            }
            # Not remove_parametrizations: it changes the class, which a copy shares with the original module.
            module.__class__ = type(module).__mro__[1]
            del module.parametrizations
            for name, weight in weights.items():
                module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return merged
