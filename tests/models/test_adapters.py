"""Adapters train a small part of a backbone and leave every other tensor as it is."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

from project.classifier import ImageClassifier
from project.errors import ConfigError
from project.models.adapters import AdapterName, make_adapter
from project.models.backbone import Backbone, merge_adapters
from project.models.cut import Cut
from project.models.loading import load_backbone
from project.preprocessing import Preprocessing
from tests.conftest import BACKBONE

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

ADAPTERS = ("bias", "norm", "lora")


class Attention(nn.Module):
    """A vision transformer of one block, with torch's attention, whose weight of q, k and v is one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.block(self.patches(images).flatten(2).transpose(1, 2)).mean(1)
        return output


@functools.cache
def pretrained(name: str) -> Backbone:
    if name == "attention":
        torch.manual_seed(0)
        image = Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return Backbone(name, {"body": Attention()}, 16, image)
    backbone = load_backbone(name, None)
    for parameter in backbone.parameters():
        if not parameter.any():
            parameter.data += 0.1  # some scales start at zero, so that other parameters have no gradient
    backbone.sha256 = backbone.fingerprint(backbone.cut)
    return backbone


def images(name: str) -> torch.Tensor:
    size = 160 if "vit" in name else 32
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def features(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():  # in which torch's attention takes another path
        output: torch.Tensor = backbone.eval()(images(backbone.name))
    return output


def adapted(name: str, adapter: AdapterName, trainable: str = "all", **settings: Any) -> Backbone:
    backbone, made = pretrained(name), make_adapter(adapter, **settings)
    assert made is not None
    cut = backbone.cut_at(trainable)
    copied = backbone.specialized(cut, made)
    copied.adapt(made, cut)
    return copied


def step(backbone: Backbone, rate: float = 0.1) -> None:
    """Train all trainable parameters for two steps: after one, half of the low-rank factors have no gradient."""
    optimizer = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=rate)
    backbone.train()
    for _ in range(2):
        optimizer.zero_grad()
        target = torch.randn(4, backbone.feature_dim, generator=torch.Generator().manual_seed(1))
        (backbone(images(backbone.name)) - target).square().mean().backward()
        optimizer.step()


def snapshot(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.stages.state_dict().items()}


def trained(backbone: Backbone) -> set[str]:
    assert backbone.adapter is not None
    stages = {name: name.replace(".", "_") for name in backbone.cut.trainable}
    return {
        f"{key}.{name}" for stage, key in stages.items() for name in backbone.adapter.trained(backbone.stages[stage])
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", [BACKBONE, "timm/test_vit", "mobilenet_v3_small", "attention"])
def test_training_changes_the_adapter_only(name: str, adapter: AdapterName) -> None:
    backbone, original = adapted(name, adapter), pretrained(name)
    assert torch.equal(features(backbone), features(original)), "it starts as pretrained"
    before, sha256 = snapshot(backbone), backbone.frozen_fingerprint(backbone.cut)
    assert {name for name, p in backbone.stages.named_parameters() if p.requires_grad} == trained(backbone)
    step(backbone)
    after = snapshot(backbone)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained(backbone)
    assert backbone.frozen_fingerprint(backbone.cut) == sha256
    assert not torch.equal(features(backbone), features(original))
    for stage in original.stages:
        for key, tensor in original.stages[stage].state_dict().items():
            whole = f"{stage.replace('.', '_')}.{key}"
            path, _, parameter = whole.rpartition(".")
            same = f"{path}.parametrizations.{parameter}.original"
            name_now = same if same in after else whole
            assert name_now in trained(backbone) or torch.equal(after[name_now], tensor), key
    assert original.fingerprint(original.cut) == original.sha256, "shared tensors are not trained"


def test_norm_and_bias_train_the_parameters_of_their_name() -> None:
    names = {adapter: trained(adapted("timm/test_vit", adapter)) for adapter in ADAPTERS}
    assert all(name.endswith(".bias") for name in names["bias"]) and any("qkv" in name for name in names["bias"])
    assert {name.split(".")[-2] for name in names["norm"]} <= {"norm", "norm1", "norm2", "fc_norm"}
    assert {name.rpartition(".")[2] for name in names["norm"]} == {"weight", "bias"}
    assert any(".attn.qkv.parametrizations.weight.0.up" in name for name in names["lora"])
    assert "body.block.self_attn.parametrizations.in_proj_weight.0.up" in trained(adapted("attention", "lora"))


def test_statistics_are_fixed_and_dropout_is_active_in_adapted_stages() -> None:
    for adapter in ADAPTERS:
        backbone = adapted("mobilenet_v3_small", adapter, "stage4")
        backbone.stages["stage4"].add_module("dropout", nn.Dropout())
        backbone.train()
        modes = {kind: set() for kind in (nn.BatchNorm2d, nn.Conv2d, nn.Dropout)}
        for module in backbone.stages["stage4"].modules():
            for kind in modes.keys() & set(type(module).__mro__):
                modes[kind].add(module.training)
        assert modes == {nn.BatchNorm2d: {False}, nn.Conv2d: {True}, nn.Dropout: {True}}
        assert not any(module.training for module in backbone.stages["stage3"].modules())


@pytest.mark.parametrize("name", [BACKBONE, "timm/test_vit", "attention"])
def test_merged_backbone_gives_the_same_features_in_plain_layers(name: str) -> None:
    backbone = adapted(name, "lora", rank=3)
    step(backbone, 0.01)
    before, expected = snapshot(backbone), features(backbone)
    merged = merge_adapters(backbone)
    torch.testing.assert_close(features(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.stages.state_dict().keys() == pretrained(name).stages.state_dict().keys()
    assert not torch.allclose(expected, features(pretrained(name)), rtol=1e-2)
    assert merged.sha256 != backbone.sha256 and merged.adapter is None
    for parameter in merged.parameters():
        parameter.data.zero_()
    assert torch.equal(features(backbone), expected), "the copy shares nothing"
    assert all(torch.equal(before[key], tensor) for key, tensor in snapshot(backbone).items())


def test_targets_select_layers_by_parts_of_their_names() -> None:
    names = trained(adapted("timm/test_vit", "lora", targets=["qkv", "mlp"]))
    layers = {name.partition(".parametrizations")[0].rpartition(".")[2] for name in names}
    assert layers == {"qkv", "fc1", "fc2"}
    assert not any(".conv_dw." in name for name in trained(adapted("timm/tf_efficientnet_lite0", "lora", "stage4")))
    assert any(
        ".conv_dw." in name for name in trained(adapted("timm/tf_efficientnet_lite0", "lora", targets=["conv_dw"]))
    )


def test_rank_is_limited_to_that_of_the_weight() -> None:
    backbone = adapted(BACKBONE, "lora", "layer4", rank=10**6)
    shapes = [value.shape for name, value in backbone.stages.named_parameters() if name.endswith(".down")]
    assert shapes and all(rank <= columns for rank, columns in shapes)


def test_stages_before_the_first_adapted_one_are_frozen() -> None:
    backbone = adapted(BACKBONE, "lora", targets=["layer3", "layer4"])
    assert backbone.cut == pretrained(BACKBONE).cut_at("layer3")


def test_rows_are_keyed_by_the_frozen_stages_only() -> None:
    fingerprints = set()
    for adapter in ADAPTERS:
        backbone = adapted(BACKBONE, adapter, "layer4")
        fingerprints.add(backbone.fingerprint(backbone.cut))
        assert backbone.frozen_fingerprint(backbone.cut) not in fingerprints
    original = pretrained(BACKBONE)
    assert fingerprints == {original.fingerprint(original.cut_at("layer4"))}


def test_classifiers_share_the_base_of_a_backbone_and_have_adapters_of_their_own(weights: Any) -> None:
    backbone = load_backbone(BACKBONE, str(weights), 32)
    first, second = (ImageClassifier(backbone, trainable="all", adapter="lora", classes=["a", "b"]) for _ in range(2))
    name = "layer4.layer4.0.conv1"
    one, two = (model.backbone.stages.get_submodule(name) for model in (first, second))
    assert one.parametrizations.weight.original is two.parametrizations.weight.original
    assert one.parametrizations.weight[0].up is not two.parametrizations.weight[0].up
    assert one.parametrizations.weight.original is backbone.stages.get_submodule(name).weight
    with pytest.raises(ConfigError, match="is adapted already"):
        ImageClassifier(first.backbone, trainable="all", adapter="bias")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter": "lora"}, "model.adapter lora has no effect with model.trainable head"),
        ({"adapter": "norm", "trainable": "head"}, "Use --model.trainable all, or a stage such as layer4"),
        ({"lora_rank": 4, "trainable": "all"}, "model.lora_rank has no effect with model.adapter none"),
        ({"lora_targets": ["x"], "adapter": "bias", "trainable": "all"}, "lora_targets has no effect with .* bias"),
        ({"lora_rank": 0, "adapter": "lora", "trainable": "all"}, "model.lora_rank must be at least 1, not 0"),
        ({"lora_targets": [""], "adapter": "lora", "trainable": "all"}, "model.lora_targets has an empty name"),
        ({"lora_targets": ["layer1"], "adapter": "lora", "trainable": "layer4"}, "of layer4 is called 'layer1'"),
    ],
)
def test_settings_without_effect_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ImageClassifier(pretrained(BACKBONE), **arguments)
    assert len(str(error.value).splitlines()) <= 2


def test_stages_without_such_parameters_are_refused() -> None:
    image = Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4, bias=False))
    for adapter in ("bias", "norm"):
        backbone, made = Backbone("plain", {"body": copy.deepcopy(network)}, 4, image), make_adapter(adapter)
        assert made is not None
        with pytest.raises(ConfigError, match=f"model.adapter {adapter}: body of plain has no such parameters"):
            backbone.adapt(made, Cut((), ("body",)))
