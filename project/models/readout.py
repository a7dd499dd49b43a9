"""Readouts: which outputs of a backbone's stages are its features."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from project.errors import ConfigError, ModelError
from project.models.cut import Cut
from project.models.network_parts import Part, TokenLayout

FeatureKind = Literal["last", "stages", "cls", "mean", "cls+mean", "last4"]
#: Number of last blocks whose tokens are read, if more than one.
BLOCKS_READ: Mapping[FeatureKind, int] = {"last4": 4}
#: Runs the last stages on their input and returns features ``(B, D)``.
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
    """Average maps, or tokens ``(B, N, K)``, to ``(B, K)``; the last stage outputs ``(B, K)``."""
    if outputs.dim() == 3:
        return outputs.mean(1)
    return outputs if outputs.dim() == 2 else outputs.mean((1, 2) if channels_last else (2, 3))


def read_tokens(kind: FeatureKind, stages: Sequence[nn.Module], inputs: torch.Tensor) -> torch.Tensor:
    """Concatenate tokens of a transformer's last blocks, as the evaluation of DINOv2 does (arXiv:2304.07193).

    Args:
        kind: ``cls``: the class token; ``mean``: the mean of the patch tokens; ``cls+mean``: both; ``last4``: the class
            tokens of the last four blocks.
        stages: The last stages of a transformer, or the whole one.
        inputs: Input of the first of these stages; for the whole transformer, normalized images ``(B, 3, H, W)``.
    """
    count = BLOCKS_READ.get(kind, 1)
    blocks = _last_blocks(stages, inputs, count) if isinstance(stages[-1], Part) else _blocks(stages[0], inputs, count)
    parts = [prefix[:, 0] for prefix, _ in blocks] if kind != "mean" else []
    if kind in ("mean", "cls+mean"):
        parts.append(blocks[-1][1].mean(1))
    network: Any = getattr(stages[-1], "network", stages[-1])
    norm: Any = getattr(network, "fc_norm", nn.Identity())  # timm normalizes the mean of patch tokens, not the tokens
    return torch.cat([norm(part) for part in parts], 1)


def _last_blocks(stages: Sequence[nn.Module], inputs: torch.Tensor, count: int) -> list[Tokens]:
    """Normalized tokens of the last blocks of a transformer whose stages are its blocks."""
    outputs: deque[torch.Tensor] = deque(maxlen=count)
    for stage in stages:
        assert isinstance(stage, Part)
        inputs = stage.run_blocks(inputs)
        outputs.append(inputs)
    last: Any = stages[-1]
    normed = [last.network.get_submodule(last.tokens.norm)(tokens) for tokens in outputs]
    return [(tokens[:, : last.tokens.prefix], tokens[:, last.tokens.prefix :]) for tokens in normed]


def _blocks(body: Any, images: torch.Tensor, count: int) -> list[Tokens]:
    """Normalized tokens of the last blocks of a transformer of timm that is a single stage."""
    options = {"return_prefix_tokens": body.num_prefix_tokens > 0, "output_fmt": "NLC", "intermediates_only": True}
    outputs = body.forward_intermediates(images, indices=count, norm=True, **options)
    return [(out[1], out[0]) if isinstance(out, tuple) else (out[:, :0], out) for out in outputs]


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
    *_, last = stages.values()
    layout = _token_layout(last)
    kinds: list[FeatureKind] = ["last", "stages"] if len(stages) > 1 else ["last"]
    if layout is None:
        return kinds
    if not layout.has_class_token:
        return [*kinds, "mean"]
    tokens: list[FeatureKind] = ["cls", "mean", "cls+mean", "last4"]
    # One stage is the stem; the others are blocks.
    return [*kinds, *(kind for kind in tokens if len(stages) == 1 or BLOCKS_READ.get(kind, 1) < len(stages))]


def _token_layout(last: Any) -> TokenLayout | None:
    """Layout of the tokens of a network with this last stage; ``None`` if it has none."""
    if isinstance(last, Part):
        return last.tokens
    if not (hasattr(last, "forward_intermediates") and hasattr(last, "num_prefix_tokens")):
        return None
    return TokenLayout(last.num_prefix_tokens, getattr(last, "cls_token", None) is not None, "norm")


def validate_features(kind: FeatureKind, cut: Cut) -> None:
    """Check that rows at a cut are enough to compute a kind of features.

    Raises:
        ConfigError: The features include outputs of stages before the cut.
    """
    if kind == "stages" and cut.frozen and cut.trainable:
        raise ConfigError(
            "model.features stages needs all stages on one side: a row at a cut between stages lacks the outputs of "
            "earlier ones.\nUse --model.trainable head or all, or --model.features last."
        )
    if cut.frozen and 0 < len(cut.trainable) < BLOCKS_READ.get(kind, 1):
        raise ConfigError(
            f"model.features {kind} reads the last {BLOCKS_READ[kind]} blocks, but a row at the cut lacks the outputs "
            f"of those before {cut.trainable[0]}.\nUse --model.trainable head or -{BLOCKS_READ[kind]}, or "
            "--model.features cls."
        )


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
