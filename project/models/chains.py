"""Families of networks that are a chain of operations: for each class of torchvision and timm, its ``forward``."""

from __future__ import annotations

import math
from typing import Any

import torch

from project.models.network_parts import Chain
from project.models.stage_starts import (
    after_pooling,
    at,
    at_exactly,
    downsampling,
    numbered,
    transformer_blocks,
    vgg_blocks,
)


def _flatten(network: Any, maps: torch.Tensor) -> torch.Tensor:
    return torch.flatten(maps, 1)


def _spatial_mean(network: Any, maps: torch.Tensor) -> torch.Tensor:
    return maps.mean([2, 3])


def _first_token(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def _side(count: int) -> int:
    """Side of a square grid of tokens: images are square."""
    return math.isqrt(count)


# torchvision's vision transformer


def _torchvision_tokens(network: Any, patches: torch.Tensor) -> Any:
    tokens = torch.cat([network.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
    return tokens + network.encoder.pos_embedding


# timm's vision transformers


def _with_class_token(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    if network.cls_token is None:
        return tokens
    return torch.cat((network.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)


def _add_positions(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if network.pos_embed is None else tokens + network.pos_embed


def _eva_positions(network: Any, patches: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = network._pos_embed(patches)[0]  # the rotary embeddings are computed again in each block
    return tokens


def _eva_block(network: Any, block: Any, tokens: torch.Tensor) -> Any:
    rope = network.rope
    if rope is None:
        return block(tokens)
    side = _side(tokens.shape[1] - network.num_prefix_tokens)
    is_cached = not network.dynamic_img_size and hasattr(rope, "feat_shape")
    return block(tokens, rope=rope.get_embed() if is_cached else rope.get_embed(shape=(side, side)))


def _eva_reason(network: Any) -> str | None:
    if getattr(network, "rope_mixed", False):
        return "all blocks share the learned rotary frequencies"
    return "patches are dropped at random" if network.patch_drop is not None else None


def _sam_positions(network: Any, maps: torch.Tensor) -> torch.Tensor:
    from timm.layers.pos_embed import resample_abs_pos_embed_nhwc

    return maps if network.pos_embed is None else maps + resample_abs_pos_embed_nhwc(network.pos_embed, maps.shape[1:3])


def _sam_neck(network: Any, maps: torch.Tensor) -> Any:
    return network.neck(maps.permute(0, 3, 1, 2))


def _xcit_tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    tokens, (height, width) = network.patch_embed(images)
    if network.pos_embed is None:
        return tokens  # type: ignore[no-any-return]
    batch, patches, _ = tokens.shape
    positions = network.pos_embed(batch, height, width).reshape(batch, -1, patches).permute(0, 2, 1)
    return tokens + positions  # type: ignore[no-any-return]


def _xcit_block(network: Any, block: Any, tokens: torch.Tensor) -> Any:
    side = _side(tokens.shape[1])
    return block(tokens, side, side)


def _mvit_tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    return _add_positions(network, _with_class_token(network, network.patch_embed(images)[0]))


def _mvit_stage(network: Any, stage: Any, tokens: torch.Tensor) -> Any:
    side = _side(tokens.shape[1])  # rounded down, so a class token does not matter
    return stage(tokens, [side, side])[0]


def _pit_tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    maps = network.pos_drop(network.patch_embed(images) + network.pos_embed)
    return _pit_pack(maps, network.cls_token.expand(maps.shape[0], -1, -1))


def _pit_pack(maps: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    return torch.cat((prefix, maps.flatten(2).transpose(1, 2)), dim=1)


def _pit_stage(network: Any, stage: Any, tokens: torch.Tensor) -> torch.Tensor:
    count = tokens.shape[1]
    side = _side(count - 1)  # there are one or two prefix tokens
    patches = tokens[:, count - side**2 :]
    maps = patches.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)
    return _pit_pack(*stage((maps, tokens[:, : count - side**2])))


def _pit_prefix(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, : tokens.shape[1] - _side(tokens.shape[1] - 1) ** 2]


# timm's other networks


def _levit_tokens(network: Any, maps: torch.Tensor) -> torch.Tensor:
    return maps if network.use_conv else maps.flatten(2).transpose(1, 2)


def _nest_norm(network: Any, maps: torch.Tensor) -> Any:
    return network.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _joined(network: Any, maps: Any) -> torch.Tensor:
    """The residual and the dense maps of a dual path block, concatenated to one tensor for the next stage."""
    return torch.cat(maps, dim=1) if isinstance(maps, tuple) else maps


def _branches(network: Any, maps: torch.Tensor) -> torch.Tensor:
    """The parallel branches of HRNet, and their aggregation."""
    branches = [transition(maps) for transition in network.transition1]
    for stage, following in ((network.stage2, network.transition2), (network.stage3, network.transition3)):
        outputs = stage(branches)
        branches = [
            outputs[index] if isinstance(transition, torch.nn.Identity) else transition(outputs[-1])
            for index, transition in enumerate(following)
        ]
    outputs = network.stage4(branches)
    total: torch.Tensor = network.incre_modules[0](outputs[0])
    for index, down in enumerate(network.downsamp_modules):
        total = network.incre_modules[index + 1](outputs[index + 1]) + down(total)
    return total


def _shared_bias(network: Any) -> str | None:
    names = ("rel_pos_bias", "shared_rel_pos")
    is_shared = any(getattr(network, name, None) is not None for name in names)
    return "all blocks share the table of relative positions" if is_shared else None


def _no_aggregation(network: Any) -> str | None:
    return "it has no head to aggregate its branches" if network.incre_modules is None else None


def _chains(package: str, classes: str, *steps: Any, **options: Any) -> dict[str, Chain]:
    return {f"{package}.{name}": Chain(steps, **options) for name in classes.split()}


def _timm(classes: str, *steps: Any, **options: Any) -> dict[str, Chain]:
    """Families of timm, whose networks all end with ``forward_head``."""
    return _chains("timm", classes, *steps, "forward_head", **options)


_BLOCKS: dict[str, Any] = {"names": transformer_blocks}
_TOKENS: dict[str, Any] = {"names": transformer_blocks, "norm": "norm"}

#: Families by package and class name of the network.
CHAINS: dict[str, Chain] = {
    **_chains(
        "torchvision",
        "AlexNet",
        "features.* avgpool",
        _flatten,
        "classifier",
        starts_stage=lambda path, child, previous: path == "avgpool" or after_pooling(path, child, previous),
        names=vgg_blocks(3),
    ),
    **_chains("torchvision", "SqueezeNet", "features.* classifier", _flatten, starts_stage=after_pooling),
    **_chains(
        "torchvision",
        "ShuffleNetV2",
        "conv1 maxpool stage2 stage3 stage4 conv5",
        _spatial_mean,
        "fc",
        starts_stage=at("stage"),
        names=lambda index: f"stage{index + 1}" if index else "stem",
    ),
    **_chains(
        "torchvision",
        "MNASNet",
        "layers.*",
        _spatial_mean,
        "classifier",
        starts_stage=at_exactly("layers.8", "layers.9", "layers.10", "layers.12"),
    ),
    **_chains(
        "torchvision",
        "GoogLeNet",
        "_transform_input conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b "
        "maxpool3 inception4a inception4b inception4c inception4d inception4e maxpool4 inception5a inception5b avgpool",
        _flatten,
        "dropout fc",
        starts_stage=at_exactly("conv2", "inception3a", "inception4a", "inception5a"),
    ),
    **_chains(
        "torchvision",
        "Inception3",
        "_transform_input Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 "
        "Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e "
        "Mixed_7a Mixed_7b Mixed_7c avgpool dropout",
        _flatten,
        "fc",
        starts_stage=at_exactly("Conv2d_3b_1x1", "Mixed_5b", "Mixed_6a", "Mixed_7a"),
    ),
    **_chains("torchvision", "MaxVit", "stem blocks.* classifier"),
    **_chains(
        "torchvision",
        "VisionTransformer",
        "_process_input",
        _torchvision_tokens,
        "encoder.dropout encoder.layers.* encoder.ln",
        _first_token,
        "heads",
        names=transformer_blocks,
        norm="encoder.ln",
    ),
    **_timm(
        "VisionTransformer VisionTransformerDistilled",
        "patch_embed _pos_embed patch_drop norm_pre blocks.* norm",
        **_TOKENS,
    ),
    **_timm(
        "Beit",
        "patch_embed",
        _with_class_token,
        _add_positions,
        "pos_drop blocks.* norm",
        indivisible=_shared_bias,
        **_TOKENS,
    ),
    **_timm(
        "VisionTransformerRelPos",
        "patch_embed",
        _with_class_token,
        "blocks.* norm",
        indivisible=_shared_bias,
        **_TOKENS,
    ),
    **_timm(
        "Eva",
        "patch_embed",
        _eva_positions,
        "norm_pre blocks.* norm",
        call=_eva_block,
        shared=("rope",),
        indivisible=_eva_reason,
        **_TOKENS,
    ),
    **_timm(
        "VisionTransformerSAM",
        "patch_embed",
        _sam_positions,
        "pos_drop patch_drop norm_pre blocks.*",
        _sam_neck,
        last=("neck",),
        channels_last=True,
        **_BLOCKS,
    ),
    **_timm(
        "Cait",
        "patch_embed",
        _add_positions,
        "pos_drop blocks.* forward_cls norm",
        last=("cls_token",),
        **_BLOCKS,
    ),
    **_timm(
        "Xcit",
        _xcit_tokens,
        "pos_drop blocks.* forward_cls norm",
        call=_xcit_block,
        last=("cls_token",),
        **_BLOCKS,
    ),
    **_timm("MultiScaleVit", _mvit_tokens, "stages.* norm", call=_mvit_stage),
    **_timm("PoolingVisionTransformer", _pit_tokens, "transformers.*", _pit_prefix, "norm", call=_pit_stage),
    **_timm("Hiera", "patch_embed _pos_embed unroll blocks.*", **_BLOCKS),
    **_timm("HieraDet", "patch_embed _pos_embed blocks.*", channels_last=True, **_BLOCKS),
    **_timm("ConvMixer", "stem blocks.*", **_BLOCKS),
    **_timm("MlpMixer", "stem blocks.* norm", **_BLOCKS),
    **_timm("SwinTransformer SwinTransformerV2", "patch_embed layers.* norm", channels_last=True),
    **_timm("FocalNet", "stem layers.* norm"),
    **_timm("Levit LevitDistilled", "stem", _levit_tokens, "stages.*"),
    **_timm("Nest", "patch_embed levels.*", _nest_norm),
    **_timm("Sequencer2d", "stem stages.* norm", channels_last=True),
    **_timm(
        "CspNet CspNext HighPerfGpuNet IFormer MetaNeXt MambaOut MetaFormer RepVit VovNet EfficientVit "
        "EfficientVitLarge GlobalContextVit CPUBone LCNetV2 LowFormer",
        "stem stages.*",
    ),
    **_timm("CSATv2", "stem_dct stages.*"),
    **_timm("MaxxVit EfficientFormer EfficientFormerV2 NextViT ResNetV2 StarNet SwiftFormer", "stem stages.* norm"),
    **_timm("DaVit EdgeNeXt", "stem stages.* norm_pre"),
    **_timm("RDNet", "stem dense_stages.* norm_pre"),
    **_timm("ByobNet FastVit", "stem stages.* final_conv"),
    **_timm("NormFreeNet", "stem stages.* final_conv final_act"),
    **_timm(
        "TinyVit EfficientVitMsra FasterNet SHViT PyramidVisionTransformerV2 SwinTransformerV2Cr",
        "patch_embed stages.*",
    ),
    **_timm("RexNet", "stem features.*", starts_stage=downsampling),
    **_timm("GhostNet RepGhostNet", "conv_stem bn1 act1 blocks.*", starts_stage=downsampling),
    **_timm("XceptionAligned", "stem blocks.* act", starts_stage=downsampling),
    **_timm("TResNet", "body.*", starts_stage=at("body.layer"), names=numbered("layer")),
    **_timm("SENet", "layer0 pool0 layer1 layer2 layer3 layer4", starts_stage=at("layer"), names=numbered("layer")),
    **_timm(
        "DLA",
        "base_layer level0 level1 level2 level3 level4 level5",
        starts_stage=at("level2", "level3", "level4", "level5"),
    ),
    **_timm(
        "DPN",
        "features.*",
        starts_stage=at_exactly("features.conv2_1", "features.conv3_1", "features.conv4_1", "features.conv5_1"),
        end=_joined,
    ),
    **_timm(
        "HighResolutionNet",
        "conv1 bn1 act1 conv2 bn2 act2 layer1",
        _branches,
        "final_layer",
        starts_stage=at_exactly("layer1", "_branches"),
        indivisible=_no_aggregation,
        last=(
            "transition1",
            "stage2",
            "transition2",
            "stage3",
            "transition3",
            "stage4",
            "incre_modules",
            "downsamp_modules",
        ),
    ),
    **_timm(
        "Xception",
        "conv1 bn1 act1 conv2 bn2 act2 block1 block2 block3 block4 block5 block6 block7 block8 block9 "
        "block10 block11 block12 conv3 bn3 act3 conv4 bn4 act4",
        starts_stage=at_exactly("block1", "block2", "block3", "block12"),
    ),
    **_timm("InceptionV4", "features.*", starts_stage=at_exactly("features.6", "features.10", "features.18")),
    **_timm(
        "InceptionResnetV2",
        "conv2d_1a conv2d_2a conv2d_2b maxpool_3a conv2d_3b conv2d_4a maxpool_5a mixed_5b repeat "
        "mixed_6a repeat_1 mixed_7a repeat_2 block8 conv2d_7b",
        starts_stage=at_exactly("conv2d_3b", "mixed_5b", "mixed_6a", "mixed_7a"),
    ),
    **_timm(
        "InceptionV3",
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Pool1 Conv2d_3b_1x1 Conv2d_4a_3x3 Pool2 Mixed_5b "
        "Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c",
        starts_stage=at_exactly("Conv2d_3b_1x1", "Mixed_5b", "Mixed_6a", "Mixed_7a"),
    ),
}

#: Why the networks of other families are a single stage, by package and class name.
REASONS: dict[str, str] = {
    "timm.NASNetALarge": "each cell reads the outputs of the two cells before it",
    "timm.PNASNet5Large": "each cell reads the outputs of the two cells before it",
    "timm.SelecSls": "each block reads the outputs of earlier blocks",
    "timm.CoaT": "its blocks run on several resolutions in parallel",
    "timm.CrossVit": "its blocks run on two sets of tokens in parallel",
    "timm.TNT": "its blocks run on pixel tokens and patch tokens in parallel",
    "timm.EfficientViM": "its features are the outputs of all stages",
    "timm.EfficientViMDistilled": "its features are the outputs of all stages",
    "timm.MobileNetV5": "its features combine the outputs of several stages",
    "timm.MobileNetV5Encoder": "its features combine the outputs of several stages",
}
