from collections import Counter
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

from project.models.registry import architecture
from project.models.stages import FAMILIES, family_name, reason_for_single_stage, split_into_stages
from tests.models.fast_init import FastInit

RESNET = ["stem", "layer1", "layer2", "layer3", "layer4"]
BLOCKS = ["stem", "block1", "block2", "block3", "block4"]
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]
VGG = ["block1", "block2", "block3", "block4", "block5", "fc"]

#: A small network of each family, and variants: BatchNorm, deep stem, another downsampling.
NAMES = {
    "resnet18": RESNET,
    "resnext50_32x4d": RESNET,
    "vgg11": VGG,
    "vgg11_bn": VGG,
    "densenet121": BLOCKS,
    "mobilenet_v2": STAGES,
    "mobilenet_v3_small": STAGES,
    "efficientnet_b0": STAGES,
    "efficientnet_v2_s": STAGES,
    "convnext_tiny": STAGES,
    "regnet_x_400mf": BLOCKS,
    "regnet_y_400mf": BLOCKS,
    "swin_t": STAGES,
    "swin_v2_t": STAGES,
    "timm/resnet18": RESNET,
    "timm/resnet26d": RESNET,
    "timm/test_resnet": RESNET,
    "timm/vgg11": VGG,
    "timm/densenet121": BLOCKS,
    "timm/tf_efficientnet_lite0": STAGES,
    "timm/mobilenetv2_050": STAGES,
    "timm/mobilenetv3_small_050": STAGES,
    "timm/convnext_atto": STAGES,
    "timm/convnextv2_atto": STAGES,
    "timm/regnetx_002": BLOCKS,
    "timm/regnety_002": BLOCKS,
}
#: Networks with a single stage: their forward is not a chain.
SINGLE_STAGE = ("timm/tnt_s_legacy_patch16_224", "timm/crossvit_tiny_240", "timm/selecsls42")


def whole_network(name):
    with FastInit():
        if name.startswith("timm/"):
            return timm.create_model(name.removeprefix("timm/")).eval()
        return torchvision.models.get_model(name, weights=None).eval()


def backbone_of(network, name):
    """A network without classifier that has the weights of a whole one, and the number of its features."""
    with FastInit():
        return architecture(name).build(dict(network.state_dict()))


def without_weights(name):
    """A network whose weights do not matter. torchvision's RegNet computes its widths on the default device."""
    with FastInit() if name.startswith("regnet") else torch.device("meta"):
        return architecture(name).build(None)[0]


def with_random_statistics(network):
    """Randomise running statistics: with means of 0 and variances of 1, a misplaced BatchNorm would not be noticed."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@torch.no_grad()
def classifier_input(network, images):
    """Features of the original network: the input of its last layer."""
    classifier = [module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    inputs = []
    handle = classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network(images)
    handle.remove()
    return inputs[0]


def images_for(name, size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_family_is_covered():
    assert {family_name(without_weights(name)) for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_stages_in_sequence_are_bit_identical_to_the_network_and_halve_the_resolution(name):
    torch.manual_seed(0)
    original, images = with_random_statistics(whole_network(name)), images_for(name)
    features = classifier_input(original, images)
    model, width = backbone_of(original, name)
    with torch.no_grad():
        whole = model.eval()(images)
    stages = split_into_stages(model)
    assert list(stages) == NAMES[name]
    # The stages contain all parameters and buffers, each once.
    for kind in ("parameters", "buffers"):
        parts = Counter(id(tensor) for stage in stages.values() for tensor in getattr(stage, kind)())
        assert parts == Counter(id(tensor) for tensor in getattr(model, kind)())
    rows = images
    with torch.no_grad():
        for stage in stages.values():
            rows = stage(rows)
    assert rows.shape == (2, width)
    assert torch.equal(rows, whole)
    assert torch.equal(rows, features)
    assert not torch.equal(rows[0], rows[1])
    assert_each_stage_halves_the_resolution(stages.values(), channels_last=name.startswith("swin"))


def assert_each_stage_halves_the_resolution(stages, channels_last):
    """Except from the stem to the first stage: ResNet and timm's ConvNeXt keep it there."""
    sizes, rows = [], torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        for stage in list(stages)[:-1]:
            rows = stage(rows)
            sizes.append(rows.shape[1 if channels_last else 2])
    assert len(sizes) >= 3
    assert {after / before for before, after in pairwise(sizes[1:])} == {0.5}
    assert sizes[0] / sizes[1] in (1, 2)


@pytest.mark.parametrize("name", SINGLE_STAGE)
def test_network_that_is_not_a_chain_is_a_single_stage(name):
    torch.manual_seed(0)
    original, images = whole_network(name), images_for(name, 240 if "240" in name else 224)
    model, width = backbone_of(original, name)
    stages = split_into_stages(model.eval())
    assert list(stages) == ["body"]
    assert reason_for_single_stage(model)
    with torch.no_grad():
        features = stages["body"](images)
        expected = original.forward_head(original.forward_features(images), pre_logits=True)
    assert features.shape == (2, width)
    assert torch.equal(features, expected)


@pytest.mark.parametrize(
    ("name", "stage", "submodule"),
    [
        ("resnet18", "layer4", "layer4"),
        ("resnet18", "layer1", "layer1"),
        ("densenet121", "block4", "features.denseblock4"),
        ("regnet_y_400mf", "block3", "trunk_output.block3"),
        ("timm/resnet18", "layer3", "layer3"),
        ("timm/regnety_002", "block2", "s2"),
        ("timm/convnext_atto", "stage3", "stages.2"),
    ],
)
def test_stage_starts_with_the_submodule_of_the_same_name(name, stage, submodule):
    model = without_weights(name)
    first = next(model.get_submodule(submodule).parameters())
    assert next(split_into_stages(model)[stage].parameters()) is first


def test_vgg_fc_stage_has_the_two_hidden_linear_layers():
    model = without_weights("vgg11")
    layers = [module for module in split_into_stages(model)["fc"].modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(25088, 4096), (4096, 4096)]
