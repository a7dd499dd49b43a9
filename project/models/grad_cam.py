"""Grad-CAM heat maps (Selvaraju et al., arXiv:1610.02391)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList

from project.errors import ModelError
from project.models.backbone import Backbone
from project.task import Task


def heat_maps(
    backbone: Backbone, head: nn.Module, task: Task, images: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute how much each image region contributes to a class.

    The last feature maps are weighted by the mean gradient of the class's logit, summed over channels and clipped at
    0. The gradient starts at these maps, so no parameter needs one and frozen networks work too.

    Args:
        backbone: Backbone in ``eval()`` mode.
        head: Maps features ``(B, D)`` to logits ``(B, C)``.
        task: Predicts the class if ``labels`` is ``None``.
        images: ``(B, 3, S, S)``, uint8 or float in [0, 1].
        labels: Class index for each image, int64 ``(B,)``; by default the predicted class.

    Returns:
        Float32 ``(B, S, S)`` in [0, 1]; the maximum of each image is 1, or 0 if no region contributes.

    Raises:
        ModelError: The network does not pool feature maps.
    """
    maps: list[torch.Tensor] = []

    def detach_maps(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        maps[:] = [output.detach().requires_grad_()]  # keep the last output of a module that is called repeatedly
        return maps[0].clone()  # later layers may modify it in place

    with torch.inference_mode(False), torch.enable_grad():
        inputs = backbone.normalize(images.clone())  # inference tensors cannot be part of a graph
        # Not Backbone.forward: it runs frozen stages under no_grad, and hooks on it would fire in other threads.
        tensors = {id(tensor): tensor for tensor in (*backbone.stages.parameters(), *backbone.stages.buffers())}
        network = copy.deepcopy(nn.Sequential(*backbone.stages.values()), tensors)  # shares parameters and buffers
        last, channels_last = _last_maps(network, inputs[:1], backbone.name)
        last.register_forward_hook(detach_maps)
        logits = head(backbone.readout([*backbone.stages])([*network], inputs)).float()
        targets = task.predict(logits).label if labels is None else labels.clone()
        (gradients,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps)
    channel_dim = -1 if channels_last else 1
    values, gradients = (tensor.detach().float().movedim(channel_dim, 1) for tensor in (maps[0], gradients))
    heat = (values * gradients.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    heat = functional.interpolate(heat, images.shape[-2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _last_maps(network: nn.Module, image: torch.Tensor, name: str) -> tuple[nn.Module, bool]:
    """Find the module that outputs the last maps before pooling, and whether these are channels-last.

    Images are square, so their feature maps are square too, unlike other 4-D tensors.
    """
    outputs: list[tuple[nn.Module, torch.Size]] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = output.shape if isinstance(output, torch.Tensor) else torch.Size()
        if (len(shape) == 4 and max(shape[2:]) > 1) or (len(shape) == 3 and shape[1] > 1):
            outputs.append((module, shape))

    # The outputs of parametrizations, such as low-rank updates, are weights: they look like maps if kernels are square.
    weights = {
        part for module in network.modules() if isinstance(module, ParametrizationList) for part in module.modules()
    }
    hooks = [module.register_forward_hook(record) for module in network.modules() if module not in weights]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    if outputs:
        module, shape = outputs[-1]
        if len(shape) == 4 and shape[2] == shape[3]:
            return module, False
        if len(shape) == 4 and shape[1] == shape[2] > 1:
            return module, True
    raise ModelError(
        f"Heat maps are not available for {name}: it does not pool feature maps (a vision transformer, for "
        "example, has tokens). Use a convolutional network."
    )
