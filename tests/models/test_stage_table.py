"""Which networks have stages: all of torchvision's, and the most used ones of timm."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from project.models.registry import architecture
from project.models.stages import reason_for_single_stage, split_into_stages
from tests.models.fast_init import FastInit

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
#: 100 networks of timm that are downloaded most from Hugging Face. The list is approximate: download counts change.
TIMM = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet26",
    "resnet50d",
    "resnet200d",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "seresnet50",
    "seresnext50_32x4d",
    "seresnextaa101d_32x8d",
    "resnetrs50",
    "ecaresnet50t",
    "skresnet34",
    "res2net50_26w_4s",
    "resnest50d",
    "resnetv2_50x1_bit",
    "resnetv2_101x1_bit",
    "resnetaa50",
    "mobilenetv3_small_050",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "tf_mobilenetv3_small_minimal_100",
    "mobilenetv2_100",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "mobilenetv4_hybrid_medium",
    "lcnet_050",
    "mnasnet_100",
    "fbnetc_100",
    "spnasnet_100",
    "tinynet_e",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "tf_efficientnet_b4",
    "tf_efficientnet_b7",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "efficientnetv2_rw_s",
    "convnext_tiny",
    "convnext_base",
    "convnext_large",
    "convnextv2_tiny",
    "convnextv2_base",
    "regnety_032",
    "regnety_160",
    "densenet121",
    "vgg16",
    "vgg19",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v2",
    "legacy_xception",
    "dla34",
    "dpn68",
    "hrnet_w18",
    "ghostnet_100",
    "nasnetalarge",
    "cspdarknet53",
    "ese_vovnet19b_dw",
    "repvgg_a2",
    "mobileone_s0",
    "fastvit_t8",
    "repvit_m1",
    "hgnetv2_b0",
    "efficientvit_b0",
    "edgenext_small",
    "mobilevit_s",
    "levit_128s",
    "efficientformer_l1",
    "tiny_vit_21m_224",
    "dm_nfnet_f0",
    "coatnet_0_rw_224",
    "maxvit_tiny_tf_224",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch14_siglip_384",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_base_patch16_dinov3",
    "deit_base_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_base_patch14_224",
    "samvit_base_patch16",
]
#: One of each kind, for the default tests.
TORCHVISION_SAMPLE = {
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "vgg11",
    "vit_b_32",
}
SAMPLE = {"resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "levit_128s", "mobileone_s0", "hgnetv2_b0"}


def table(names: list[str], build) -> dict[str, str]:
    """For each network, its stages, or why it has only one."""
    rows = {}
    for name in names:
        network: nn.Module = build(name)
        stages = list(split_into_stages(network))
        rows[name] = " ".join(stages) if len(stages) > 1 else f"single stage: {reason_for_single_stage(network)}"
        print(f"{name:40} {rows[name]}")
    return rows


def torchvision_network(name: str) -> nn.Module:
    # torchvision's RegNet computes its widths on the default device.
    with FastInit() if name.startswith("regnet") else torch.device("meta"):
        return architecture(name).build(None)[0]


def timm_network(name: str) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, num_classes=0)
        return network


@pytest.mark.parametrize(
    "names", [pytest.param(sorted(TORCHVISION_SAMPLE)), pytest.param(TORCHVISION, marks=pytest.mark.long)]
)
def test_all_networks_of_torchvision_have_stages(names: list[str]) -> None:
    rows = table(names, torchvision_network)
    assert len(TORCHVISION) >= 80
    assert {name: row for name, row in rows.items() if row.startswith("single stage")} == {}


@pytest.mark.parametrize("names", [pytest.param(sorted(SAMPLE)), pytest.param(TIMM, marks=pytest.mark.long)])
def test_most_networks_of_timm_have_stages(names: list[str]) -> None:
    rows = table(names, timm_network)
    single = {name: row for name, row in rows.items() if row.startswith("single stage")}
    assert len(set(TIMM)) == 100 and set(TIMM) > SAMPLE
    assert len(single) <= len(names) // 10
    assert not any(row.endswith("None") for row in single.values())
