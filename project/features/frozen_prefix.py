"""The frozen prefix of a backbone: how to run it, and an inference copy with folded BatchNorm."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from project.models.backbone import Backbone
from project.models.cut import Cut
from project.models.readout import Readout


@dataclass(frozen=True)
class PrefixSpec:
    """A frozen prefix, and the device, precision and memory format to run it with.

    Attributes:
        backbone: The backbone.
        cut: Where the prefix ends.
        encode: Maps images on ``device`` to rows, exactly as a live fit does.
        layout: Memory format of the images in ``encode``: ``channels_last`` or ``contiguous``.
        device: Device of the backbone.
        precision: Trainer precision, such as ``32-true`` or ``bf16-mixed``.
    """

    backbone: Backbone
    cut: Cut
    encode: Callable[[torch.Tensor], torch.Tensor]
    layout: str
    device: torch.device
    precision: str


class StageChain(nn.Sequential):
    """Runs stages with a readout.

    Args:
        readout: Maps the stages and their input to the output.
        stages: The stages.
    """

    def __init__(self, readout: Readout, *stages: nn.Module) -> None:
        super().__init__(*stages)
        self._readout = readout

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the stages."""
        return self._readout([*self], inputs)


class FrozenPrefix(nn.Module):
    """Inference copy of the frozen stages, normalization included: uint8 images ``(B, 3, H, W)`` to rows at the cut.

    Args:
        backbone: Source of the stages, which are copied to the CPU.
        cut: Where the prefix ends.
        dtype: Data type of weights, arithmetic and rows; normalization always runs in float32.
        layout: Memory format of the weights; ONNX export requires ``torch.contiguous_format``.
    """

    def __init__(
        self,
        backbone: Backbone,
        cut: Cut,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.stages = StageChain(
            backbone.readout(cut.frozen),
            *(copy.deepcopy(backbone.stages[name]) for name in cut.frozen),
        )
        self.stages.cpu().float()
        self.register_buffer("scale", 1 / (255 * backbone.std.detach().float().cpu()))
        self.register_buffer("shift", -backbone.mean.detach().float().cpu() / backbone.std.detach().float().cpu())
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        size = backbone.preprocessing.crop
        self.stages.eval().requires_grad_(False)
        fold_batch_norm(self.stages, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
        self.stages.to(dtype).to(memory_format=layout)
        self._dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images ``(B, 3, H, W)`` to rows."""
        values = images.float() * self.scale + self.shift
        rows: torch.Tensor = self.stages(values.to(self._dtype))
        return rows


@torch.no_grad()
def fold_batch_norm(stages: nn.Module, example: torch.Tensor) -> int:
    """Fold each BatchNorm2d into the convolution that feeds it, in place.

    Pairs are found by running the example rather than by symbolic tracing, which fails on networks with control flow.
    The folding is undone if it changes the output, as happens where another module also reads a convolution's output.

    Args:
        stages: Network in ``eval()`` mode.
        example: Input ``(B, 3, H, W)``, float32.

    Returns:
        Number of folded BatchNorm2d modules.
    """
    producer: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    outputs: list[torch.Tensor] = []  # kept alive so that no id is reused
    calls: dict[str, int] = {}

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        if isinstance(module, nn.Conv2d):
            producer[id(output)] = name
            outputs.append(output)
        elif id(inputs[0]) in producer:
            pairs.append((producer[id(inputs[0])], name))

    modules = {
        name: module for name, module in stages.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    }
    hooks = [module.register_forward_hook(functools.partial(record, name)) for name, module in modules.items()]
    before = stages(example)
    for hook in hooks:
        hook.remove()
    pairs = [pair for pair in dict.fromkeys(pairs) if all(calls[name] == 1 for name in pair)]
    original = copy.deepcopy(stages)
    for conv, norm in pairs:
        fused = torch.nn.utils.fuse_conv_bn_eval(modules[conv], modules[norm])  # type: ignore[arg-type,type-var]
        stages.set_submodule(conv, fused)
        # timm's BatchNormAct2d also contains dropout and the activation
        rest = [getattr(modules[norm], part) for part in ("drop", "act") if hasattr(modules[norm], part)]
        stages.set_submodule(norm, nn.Sequential(*rest) if rest else nn.Identity())
    after = stages(example)
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        for name, module in original.named_children():
            setattr(stages, name, module)
        return 0
    return len(pairs)
