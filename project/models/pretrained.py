"""The pretrained weights of stages that a fit trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from project.errors import ProjectError
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.models.loading import load_backbone


def pretrained_stages(backbone: Backbone, names: Sequence[str]) -> dict[str, nn.Module] | None:
    """Copy stages with their pretrained weights, frozen and in ``eval()`` mode.

    If the weights of the backbone have changed since it was loaded, they are loaded again.

    Args:
        backbone: The backbone.
        names: Names of the stages to copy.

    Returns:
        The copies by name, in memory format and device of the originals; ``None`` if the weights have changed and
        cannot be loaded again.
    """
    stages = {name: copy.deepcopy(backbone.stages[name]) for name in names}
    if backbone.fingerprint(Cut(tuple(backbone.stages))) != backbone.sha256:
        origin = backbone.origin
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same warnings as at the first time
                loaded = load_backbone(backbone.name, origin.weights, origin.image_size)
        except ProjectError:
            return None
        if loaded.sha256 != backbone.sha256:
            return None
        if backbone.adapter is not None:  # the pretrained stages have no adapter
            stages = {name: _like(loaded.stages[name], stage) for name, stage in stages.items()}
        else:
            for name, stage in stages.items():
                stage.load_state_dict(loaded.stages[name].state_dict())  # keeps the memory format
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def _like(stage: nn.Module, other: nn.Module) -> nn.Module:
    """Move a stage to the device and memory format of another one."""
    maps = [tensor for tensor in other.parameters() if tensor.dim() == 4]
    channels_last = any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device = next(other.parameters()).device
    return stage.to(device=device, memory_format=layout)  # type: ignore[call-overload,no-any-return]
