"""Readouts: which outputs of a backbone's stages are its features."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from project.errors import ModelError

FeatureKind = Literal["last", "stages", "cls", "mean", "cls+mean", "last4"]
#: Runs all stages on inputs ``(B, 3, H, W)`` and returns features ``(B, D)``.
Readout = Callable[[Sequence[nn.Module], torch.Tensor], torch.Tensor]
#: Tokens of a transformer's block: class and register tokens ``(B, P, D)``, and patch tokens ``(B, N, D)``.
Tokens = tuple[torch.Tensor, torch.Tensor]


def run_stages(stages: Sequence[nn.Module], inputs: torch.Tensor) -> torch.Tensor:
    """Run stages in sequence; the output of the last one."""
    for stage in stages:
        inputs = stage(inputs)
    return inputs


def pool_stages(stages: Sequence[nn.Module], inputs: torch.Tensor) -> torch.Tensor:
    """Concatenate the globally averaged outputs of all stages (Head2Toe, Evci et al., arXiv:2201.03529)."""
    pooled = []
    for stage in stages:
        inputs = stage(inputs)
        pooled.append(_global_average(inputs, getattr(stage, "channels_last", False)))
    return torch.cat(pooled, 1)


def _global_average(outputs: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Average maps to ``(B, K)``; the last stage outputs ``(B, K)``."""
    return outputs if outputs.dim() == 2 else outputs.mean((1, 2) if channels_last else (2, 3))


def read_tokens(kind: FeatureKind, stages: Sequence[nn.Module], inputs: torch.Tensor) -> torch.Tensor:
    """Concatenate tokens of a transformer's last blocks, as the evaluation of DINOv2 does (arXiv:2304.07193).

    Args:
        kind: ``cls``: the class token; ``mean``: the mean of the patch tokens; ``cls+mean``: both; ``last4``: the class
            tokens of the last four blocks.
        stages: A single transformer.
        inputs: Normalized images ``(B, 3, H, W)``.
    """
    (body,) = stages
    blocks = _blocks(body, inputs, 4 if kind == "last4" else 1)
    parts = [prefix[:, 0] for prefix, _ in blocks] if kind != "mean" else []
    if kind in ("mean", "cls+mean"):
        parts.append(blocks[-1][1].mean(1))
    norm: Any = getattr(body, "fc_norm", nn.Identity())  # timm normalizes the mean of patch tokens, not the tokens
    return torch.cat([norm(part) for part in parts], 1)


def _blocks(body: Any, images: torch.Tensor, count: int) -> list[Tokens]:
    """Normalized tokens of the last blocks of a transformer of timm or torchvision."""
    if hasattr(body, "forward_intermediates"):
        options = {"return_prefix_tokens": body.num_prefix_tokens > 0, "output_fmt": "NLC", "intermediates_only": True}
        outputs = body.forward_intermediates(images, indices=count, norm=True, **options)
        return [(out[1], out[0]) if isinstance(out, tuple) else (out[:, :0], out) for out in outputs]
    patches = body.conv_proj(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([body.class_token.expand(len(images), -1, -1), patches], 1)
    tokens = body.encoder.dropout(tokens + body.encoder.pos_embedding)
    last: deque[torch.Tensor] = deque(maxlen=count)
    for layer in body.encoder.layers:
        tokens = layer(tokens)
        last.append(tokens)
    return [(normed[:, :1], normed[:, 1:]) for normed in map(body.encoder.ln, last)]


def readout_of(kind: FeatureKind, stages: nn.ModuleDict, network: str) -> Readout:
    """The readout of a kind of features.

    Args:
        kind: ``last``: the output of the last stage; ``stages``: see :func:`pool_stages`; others: see
            :func:`read_tokens`.
        stages: Stages of the network.
        network: Its name, for the error message.

    Raises:
        ModelError: The network does not provide this kind.
    """
    if kind == "last":
        return run_stages
    available = available_features(stages)
    if kind not in available:
        raise ModelError(
            f"model.features: {network} does not provide {kind!r}. It provides {', '.join(available)}: only networks "
            "of several stages have stages, and only vision transformers have tokens."
        )
    return pool_stages if kind == "stages" else functools.partial(read_tokens, kind)


def available_features(stages: nn.ModuleDict) -> list[FeatureKind]:
    """The kinds of features that a network provides, given its stages."""
    if len(stages) > 1:
        return ["last", "stages"]
    (body,) = stages.values()
    is_torchvision = hasattr(body, "class_token") and hasattr(body, "conv_proj")
    has_tokens = is_torchvision or (hasattr(body, "forward_intermediates") and hasattr(body, "num_prefix_tokens"))
    if not has_tokens:
        return ["last"]
    if is_torchvision or getattr(body, "cls_token", None) is not None:
        return [kind for kind in get_args(FeatureKind) if kind != "stages"]
    return ["last", "mean"]


def feature_dim(readout: Readout, stages: Sequence[nn.Module], like: torch.Tensor, image_size: int) -> int:
    """Width D of the features of a readout, found by running one black image.

    Args:
        readout: The readout.
        stages: All stages, in ``eval()`` mode.
        like: A tensor with the device and dtype of the stages.
        image_size: Side of the image in pixels.
    """
    with torch.no_grad():
        return readout(stages, like.new_zeros(1, 3, image_size, image_size)).shape[1]
