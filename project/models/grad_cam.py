"""Where in an image a network sees a class: Grad-CAM (Selvaraju and others, arXiv:1610.02391)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from project.errors import ModelError
from project.models.backbone import Backbone
from project.task import Task


def heat_maps(
    backbone: Backbone, head: nn.Module, task: Task, images: torch.Tensor, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Say how much each place of an image speaks for a class.

    The maps before pooling are weighted by the mean gradient of the class's logit, summed over the channels, and cut
    off at 0. The network is cut where these maps leave it, so no weight needs a gradient, and a frozen one will do.

    Args:
        backbone: In ``eval()``.
        head: Features ``(B, D)`` to logits ``(B, C)``.
        task: Answers where no class is asked for.
        images: ``(B, 3, S, S)``, uint8 or float in [0, 1].
        wanted: Index of the class for each image, int64 ``(B,)``; by default the likeliest.

    Returns:
        Float32 ``(B, S, S)`` in [0, 1], the hottest place of each image at 1; all 0 where nothing speaks for the class.

    Raises:
        ModelError: The network pools no maps.
    """
    maps: list[torch.Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        maps[:] = [output.detach().requires_grad_()]  # of a module that runs more than once, its last output stays
        return maps[0].clone()  # what follows may write to it in place

    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone()  # what a caller makes in inference mode can be in no graph
        stages = _with_the_same_tensors(backbone.stages)  # hooks on the backbone would run in other threads, too
        last, channels_last = _last_maps(backbone, stages, images[:1])
        last.register_forward_hook(cut)
        logits = head(_features(backbone, stages, images)).float()
        chosen = task.answer(logits).label if wanted is None else wanted.clone()
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), maps)
    values, slopes = (each.detach().float().movedim(-1 if channels_last else 1, 1) for each in (maps[0], gradient))
    heat = (values * slopes.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    heat = functional.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _with_the_same_tensors(stages: nn.ModuleDict) -> nn.ModuleDict:
    """Modules of one's own around the same parameters and buffers."""
    tensors = (*stages.parameters(), *stages.buffers())
    return copy.deepcopy(stages, {id(tensor): tensor for tensor in tensors})


def _features(backbone: Backbone, stages: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    """Features with a gradient graph: ``Backbone.forward`` runs the frozen stages under ``no_grad``."""
    rows = backbone.normalize(images)
    for stage in stages.values():
        rows = stage(rows)
    return rows


def _last_maps(backbone: Backbone, stages: nn.ModuleDict, image: torch.Tensor) -> tuple[nn.Module, bool]:
    """The module whose output are the last maps before pooling, and whether their channels come last.

    Images are square, so maps are too: it tells them from other tensors of four dimensions.
    """
    found: list[tuple[nn.Module, torch.Size]] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = output.shape if isinstance(output, torch.Tensor) else torch.Size()
        if (len(shape) == 4 and max(shape[2:]) > 1) or (len(shape) == 3 and shape[1] > 1):
            found.append((module, shape))

    hooks = [module.register_forward_hook(look) for module in stages.modules()]
    with torch.no_grad():
        _features(backbone, stages, image)
    for hook in hooks:
        hook.remove()
    if found:
        module, shape = found[-1]
        if len(shape) == 4 and shape[2] == shape[3]:
            return module, False
        if len(shape) == 4 and shape[1] == shape[2] > 1:
            return module, True
    raise ModelError(
        f"There is no heat map of {backbone.name}: it pools no maps; a vision transformer, for one, has tokens."
    )
