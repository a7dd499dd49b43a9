"""The pretrained weights of stages that a fit trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from project.errors import ProjectError
from project.models.adapters import merge_updates
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.models.loading import load_backbone


def pretrained_stages(backbone: Backbone, names: Sequence[str]) -> dict[str, nn.Module] | None:
    """Copy stages with their pretrained weights and without adapters, frozen and in ``eval()`` mode.

    If the weights of the backbone have changed since it was loaded, they are loaded again.

    Args:
        backbone: The backbone.
        names: Names of the stages to copy.

    Returns:
        The copies by name, on the device and in the memory format of the originals; ``None`` if the weights have
        changed and cannot be loaded again.
    """
    stages = {name: merge_updates(backbone.stages[name]) for name in names}
    if backbone.fingerprint(Cut(tuple(backbone.stages))) != backbone.sha256:
        origin = backbone.origin
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # loading warned before
                loaded = load_backbone(backbone.name, origin.weights, origin.image_size)
        except ProjectError:
            return None
        if loaded.sha256 != backbone.sha256:
            return None
        for name, stage in stages.items():
            stage.load_state_dict(loaded.stages[name].state_dict())  # keeps device and memory format
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}
