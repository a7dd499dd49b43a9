"""A copy of a backbone's frozen stages for inference: normalisation included, BatchNorm folded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from project.models.backbone import Backbone
from project.models.cut import Cut


class FrozenPrefix(nn.Module):
    """A copy of a backbone's frozen stages with its normalisation: uint8 images ``(B, 3, H, W)`` to rows at the cut.

    Args:
        backbone: What is copied, onto the CPU.
        cut: Where the prefix ends.
        dtype: Of the copy's weights, its arithmetic and its rows; normalisation is done in float32.
        layout: Memory format of the copy's weights; ONNX knows the contiguous one alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        cut: Cut,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(copy.deepcopy(backbone.stages[name]) for name in cut.frozen)).cpu().float()
        self.register_buffer("scale", 1 / (255 * backbone.std.detach().float().cpu()))
        self.register_buffer("shift", -backbone.mean.detach().float().cpu() / backbone.std.detach().float().cpu())
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        size = backbone.preprocessing.crop
        self.stages.eval().requires_grad_(False)
        fold(self.stages, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        self.stages.to(dtype).to(memory_format=layout)
        self._dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images ``(B, 3, H, W)`` to rows."""
        values = images.float() * self.scale + self.shift
        rows: torch.Tensor = self.stages(values.to(self._dtype))
        return rows


@torch.no_grad()
def fold(stages: nn.Module, example: torch.Tensor) -> int:
    """Fold each BatchNorm2d into the convolution whose output alone it takes, in place.

    Which takes whose is seen in a run rather than in the code, so that networks with control flow, which no symbolic
    trace gets through, are folded too. A convolution that anything else may read is left as it is: the fold is undone
    where it changes the output.

    Args:
        stages: In ``eval()``.
        example: Input ``(B, 3, H, W)``, float32.

    Returns:
        How many were folded.
    """
    made_by: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    kept: list[torch.Tensor] = []  # so that no later tensor gets the id of a freed one
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                made_by[id(output)] = name
                kept.append(output)
            elif id(inputs[0]) in made_by:
                pairs.append((made_by[id(inputs[0])], name))

        return hook

    folding = {
        name: module for name, module in stages.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    }
    hooks = [module.register_forward_hook(watch(name)) for name, module in folding.items()]
    before = stages(example)
    for hook in hooks:
        hook.remove()
    pairs = [pair for pair in dict.fromkeys(pairs) if all(calls[name] == 1 for name in pair)]
    original = copy.deepcopy(stages)
    for conv, norm in pairs:
        fused = torch.nn.utils.fuse_conv_bn_eval(folding[conv], folding[norm])  # type: ignore[arg-type,type-var]
        _put(stages, conv, fused)
        # timm's BatchNormAct2d holds the activation too
        activation = [getattr(folding[norm], part) for part in ("drop", "act") if hasattr(folding[norm], part)]
        _put(stages, norm, nn.Sequential(*activation) if activation else nn.Identity())
    after = stages(example)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        for name, module in original.named_children():
            setattr(stages, name, module)
        return 0
    return len(pairs)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
