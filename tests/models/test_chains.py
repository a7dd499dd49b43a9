"""Networks that are divided into parts: the chain of parts equals the network's own forward, bit for bit."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

from project.models.backbone import Backbone
from project.models.chains import CHAINS
from project.models.cut import Cut
from project.models.fingerprint import fingerprint
from project.models.network_parts import Part
from project.models.registry import architecture
from project.models.stages import family_name, split_into_stages
from project.preprocessing import Preprocessing
from tests.models.fast_init import FastInit

STAGES = "stem stage1 stage2 stage3 stage4"
THREE = "stem stage1 stage2 stage3"
TWO_BLOCKS = "stem blocks.0 blocks.1"
NARROW: dict[str, Any] = {"embed_dim": 48, "num_heads": 2}


class Case(NamedTuple):
    """A network: its size is reduced by options of timm where its family allows it."""

    name: str
    stages: str
    size: int = 64
    options: dict[str, Any] | None = None


#: Networks of the default tests: torchvision's families, and the variants of timm's vision transformers.
CASES = [
    Case("alexnet", "block1 block2 block3 fc"),
    Case("squeezenet1_0", THREE),
    Case("squeezenet1_1", THREE),
    Case("shufflenet_v2_x0_5", "stem stage2 stage3 stage4"),
    Case("mnasnet0_5", STAGES),
    Case("googlenet", STAGES),
    Case("inception_v3", STAGES, 96),
    Case("vit_b_32", f"stem {' '.join(f'blocks.{i}' for i in range(12))}", 224),
    Case("timm/test_vit", f"stem {' '.join(f'blocks.{i}' for i in range(6))}", 160),
    Case("timm/test_vit2", f"stem {' '.join(f'blocks.{i}' for i in range(8))}"),
    Case("timm/test_vit3", f"stem {' '.join(f'blocks.{i}' for i in range(9))}", 160),
    Case("timm/vit_xsmall_patch16_clip_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/vit_base_patch32_siglip_256", TWO_BLOCKS, 256, {"depth": 2, **NARROW}),
    Case("timm/vit_small_patch14_reg4_dinov2", TWO_BLOCKS, 56, {"depth": 2, "img_size": 56}),
    Case("timm/vit_small_patch16_dinov3", TWO_BLOCKS, 64, {"depth": 2}),
    Case("timm/deit_tiny_distilled_patch16_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/deit3_small_patch16_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/beit_base_patch16_224", TWO_BLOCKS, 224, {"depth": 2, **NARROW}),
    Case("timm/eva02_tiny_patch14_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/vit_relpos_small_patch16_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/swin_tiny_patch4_window7_224", STAGES, 224, {"depths": (1, 1, 1, 1)}),
    Case("timm/test_maxvit", STAGES, 160),
    Case("timm/mobilevit_xxs", f"{STAGES} stage5"),
    Case("timm/cait_xxs24_224", TWO_BLOCKS, 224, {"depth": 2}),
    Case("timm/xcit_nano_12_p16_224", TWO_BLOCKS, 64, {"depth": 2}),
    Case("timm/pit_ti_distilled_224", THREE, 224),
    Case("timm/dpn48b", STAGES),
]
#: Networks of other families and variants.
LONG_CASES = [
    Case("maxvit_t", STAGES, 224),
    Case("timm/test_vit_relpos", "", 160),
    Case("timm/samvit_base_patch16", TWO_BLOCKS, 64, {"depth": 2, "img_size": 64, **NARROW, "global_attn_indexes": ()}),
    Case("timm/mvitv2_tiny", STAGES, 224),
    Case("timm/mvitv2_small_cls", STAGES, 224),
    Case("timm/pit_ti_224", THREE, 224),
    Case("timm/hiera_tiny_224", "", 224),
    Case("timm/sam2_hiera_tiny", "", 224),
    Case("timm/convmixer_768_32", "", 56),
    Case("timm/mixer_s32_224", "", 224),
    Case("timm/gmlp_s16_224", "", 224),
    Case("timm/swinv2_tiny_window8_256", STAGES, 256, {"depths": (1, 1, 1, 1)}),
    Case("timm/swinv2_cr_tiny_224", STAGES, 224, {"depths": (1, 1, 1, 1)}),
    Case("timm/focalnet_tiny_srf", STAGES),
    Case("timm/levit_128s", THREE, 224),
    Case("timm/levit_128s", THREE, 224, {"distilled": False}),
    Case("timm/levit_conv_128s", THREE, 224),
    Case("timm/nest_tiny", THREE, 224),
    Case("timm/sequencer2d_s", STAGES, 224, {"layers": (1, 1, 1, 1)}),
    Case("timm/cspresnet50", STAGES),
    Case("timm/cspnext_tiny", STAGES),
    Case("timm/hgnetv2_b0", STAGES),
    Case("timm/iformer_t", STAGES),
    Case("timm/inception_next_atto", STAGES),
    Case("timm/test_mambaout", STAGES),
    Case("timm/poolformer_s12", STAGES),
    Case("timm/caformer_s18", STAGES),
    Case("timm/repvit_m0_9", STAGES),
    Case("timm/ese_vovnet19b_slim", STAGES),
    Case("timm/efficientvit_b0", STAGES),
    Case("timm/efficientvit_l1", STAGES),
    Case("timm/efficientvit_m0", THREE, 224),
    Case("timm/gcvit_xxtiny", STAGES, 224),
    Case("timm/cpubone_nano", STAGES),
    Case("timm/lcnetv2_small", STAGES),
    Case("timm/lowformer_b0", STAGES),
    Case("timm/csatv2", STAGES, 224),
    Case("timm/test_coatnet", STAGES, 160),
    Case("timm/coatnet_nano_cc_224", STAGES, 224),
    Case("timm/efficientformer_l1", STAGES, 224),
    Case("timm/efficientformerv2_s0", STAGES, 224),
    Case("timm/nextvit_small", STAGES),
    Case("timm/resnetv2_18", STAGES),
    Case("timm/resnetv2_50x1_bit", STAGES),
    Case("timm/starnet_s050", STAGES),
    Case("timm/swiftformer_xs", STAGES),
    Case("timm/davit_tiny", STAGES, 64, {"depths": (1, 1, 1, 1)}),
    Case("timm/edgenext_xx_small", STAGES),
    Case("timm/rdnet_tiny", ""),
    Case("timm/mobileone_s0", STAGES),
    Case("timm/repvgg_a0", STAGES),
    Case("timm/mobilevitv2_050", f"{STAGES} stage5"),
    Case("timm/test_byobnet", ""),
    Case("timm/fastvit_t8", STAGES),
    Case("timm/test_nfnet", STAGES),
    Case("timm/eca_nfnet_l0", STAGES),
    Case("timm/tiny_vit_5m_224", STAGES, 224),
    Case("timm/fasternet_t0", STAGES),
    Case("timm/shvit_s1", THREE, 224),
    Case("timm/pvt_v2_b0", STAGES),
    Case("timm/rexnet_100", STAGES),
    Case("timm/ghostnet_050", STAGES),
    Case("timm/repghostnet_050", STAGES),
    Case("timm/xception41", STAGES),
    Case("timm/tresnet_m", "stem layer1 layer2 layer3 layer4"),
    Case("timm/legacy_seresnet18", "stem layer1 layer2 layer3 layer4"),
    Case("timm/dla34", STAGES),
    Case("timm/hrnet_w18_small", "stem stage1 stage2"),
    Case("timm/legacy_xception", STAGES, 96),
    Case("timm/inception_v4", THREE, 96),
    Case("timm/inception_resnet_v2", STAGES, 96),
    Case("timm/inception_v3", STAGES, 96),
]


def network_of(case: Case) -> nn.Module:
    """The network without its classifier, in eval mode, with random weights and running statistics."""
    with FastInit():
        if case.name.startswith("timm/"):
            network: nn.Module = timm.create_model(
                case.name.removeprefix("timm/"), num_classes=0, **(case.options or {})
            )
        else:
            network = architecture(case.name).build(None)[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return network.eval()


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in CASES),
        *(pytest.param(case, id=case.name, marks=pytest.mark.long) for case in LONG_CASES),
    ],
)
@torch.no_grad()
def test_parts_in_sequence_are_bit_identical_to_the_network(case: Case) -> None:
    network = network_of(case)
    images = torch.randn(2, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))
    expected, before = network(images.clone()), fingerprint([("body", network)])
    stages = split_into_stages(network)
    chain = CHAINS[family_name(network)]
    assert len(stages) >= 3
    if case.stages:
        assert list(stages) == case.stages.split()
    assert not any("_" in name for name in stages)  # the names of submodules have _ instead of a dot
    # The parts contain each parameter and buffer once, except copies of shared modules.
    copied = tuple(f"network.{name}." for name in chain.shared)
    for kind in ("parameters", "buffers"):
        tensors = [pair for stage in [*stages.values()][1:] for pair in getattr(stage, f"named_{kind}")()]
        parts = [tensor for name, tensor in tensors if not (copied and name.startswith(copied))]
        parts += getattr(stages["stem"] if "stem" in stages else stages["block1"], kind)()
        assert Counter(map(id, parts)) == Counter(map(id, getattr(network, kind)()))
    values, rows = images.clone(), []
    for stage in stages.values():
        assert isinstance(stage, Part)
        values = stage(values)
        assert isinstance(values, torch.Tensor) and len(values) == 2
        rows.append(values)
        if values.dim() == 4:
            assert (values.shape[1] == values.shape[2]) == stage.channels_last or values.shape[1] in values.shape[2:]
    assert values.shape == expected.shape and values.dim() == 2
    assert torch.equal(values, expected)
    assert not torch.equal(values[0], values[1])
    # A row of the store is a contiguous copy of one image's output; the rest of the network gives the same features.
    middle = len(rows) // 2
    again = rows[middle].contiguous().clone() if middle < len(rows) - 1 else rows[middle]
    for stage in list(stages.values())[middle + 1 :]:
        again = stage(again)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    # The fingerprint of all parts is that of the undivided network.
    backbone = Backbone(case.name, stages, expected.shape[1], Preprocessing(1, 1, "bilinear", (0, 0, 0), (1, 1, 1)))
    assert backbone.sha256 == before
    assert backbone.fingerprint(Cut(tuple(stages)[:1], tuple(stages)[1:])) != before


def test_every_chain_is_covered() -> None:
    families = set()
    for case in (*CASES, *LONG_CASES):
        with torch.device("meta"):
            if case.name.startswith("timm/"):
                network: nn.Module = timm.create_model(case.name.removeprefix("timm/"), **(case.options or {}))
            else:
                network = architecture(case.name).build(None)[0]
        families.add(family_name(network))
    assert set(CHAINS) - families == set()
