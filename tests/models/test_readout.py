"""Readouts: features of the last stage, of all stages, and of a transformer's tokens."""

from typing import Any

import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model

from project.classifier import ImageClassifier
from project.errors import ConfigError, ModelError
from project.features.frozen_prefix import FrozenPrefix
from project.models.backbone import Backbone
from project.models.grad_cam import heat_maps
from project.models.heads import LinearHead
from project.models.loading import RANDOM_SEED, load_backbone
from project.models.readout import read_tokens
from project.models.registry import architecture
from project.task import SingleLabel
from tests.features.test_engines import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


#: ``register_model`` reads this name.
default_cfgs = generate_default_cfgs({"vit_with_registers": timm.get_pretrained_cfg("test_vit").to_dict()})


@register_model
def vit_with_registers(pretrained: bool = False, **options: Any) -> torch.nn.Module:
    """A small transformer with a class token and two register tokens, as DINOv2 with registers has."""
    network: torch.nn.Module = timm.create_model("test_vit", pretrained, reg_tokens=2, **options)
    return network


def undivided_tokens(kind: Any, network: Any, images: torch.Tensor) -> torch.Tensor:
    """Token features of a network that is a single stage."""
    if hasattr(network, "forward_intermediates"):
        return read_tokens(kind, [network], images)
    tokens = torch.cat([network.class_token.expand(len(images), -1, -1), network._process_input(images)], 1)
    tokens, outputs = tokens + network.encoder.pos_embedding, []
    for layer in network.encoder.layers:
        tokens = layer(tokens)
        outputs.append(network.encoder.ln(tokens))
    parts = {"cls": [tokens[:, 0] for tokens in outputs[-1:]], "mean": [outputs[-1][:, 1:].mean(1)]}
    parts |= {"cls+mean": parts["cls"] + parts["mean"], "last4": [tokens[:, 0] for tokens in outputs[-4:]]}
    return torch.cat(parts[kind], 1)


def noise(backbone: Backbone) -> torch.Tensor:
    size = backbone.preprocessing.crop
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "timm/tf_efficientnet_lite0", "swin_t"])
@torch.no_grad()
def test_stages_are_the_spatial_means_of_each_stage(name: str) -> None:
    backbone = load_backbone(name, None, 64).eval()
    last = backbone(noise(backbone))
    backbone.set_features("stages")
    features = backbone(noise(backbone))
    values, expected = backbone.normalize(noise(backbone)), []
    for stage in backbone.stages.values():
        values = stage(values)
        if values.dim() == 4:
            channels = values if name != "swin_t" else values.movedim(3, 1)
            expected.append(channels.flatten(2).mean(2))
        else:
            expected.append(values)
    assert features.shape == (2, backbone.feature_dim)
    torch.testing.assert_close(features, torch.cat(expected, 1))
    assert torch.equal(features[:, -last.shape[1] :], last)
    assert relative_error(FrozenPrefix(backbone, backbone.cut)(noise(backbone)), features) < 1e-4


@torch.no_grad()
def test_layout_of_maps_whose_width_is_their_side() -> None:
    """At 384 px, the first stages of Swin output 96 x 96 positions of 96 channels."""
    backbone = load_backbone("swin_t", None, 384).eval()
    stem = backbone.stages["stem"](backbone.normalize(noise(backbone)))
    assert stem.shape == (2, 96, 96, 96)
    backbone.set_features("stages")
    torch.testing.assert_close(backbone(noise(backbone))[:, :96], stem.mean((1, 2)))


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("timm/test_vit", "cls"),
        ("timm/vit_with_registers", "cls"),
        ("vit_b_32", "cls"),
        ("timm/eva02_tiny_patch14_224", "mean"),
    ],
)
@torch.no_grad()
def test_tokens_of_transformers(name: str, own: str) -> None:
    backbone = load_backbone(name, None).eval()
    images, values = noise(backbone), {}
    values["last"] = backbone(images)
    for kind in ("cls", "mean", "cls+mean", "last4"):
        backbone.set_features(kind)  # type: ignore[arg-type]
        values[kind] = backbone(images)
        assert values[kind].shape == (2, backbone.feature_dim)
    assert torch.equal(values[own], values["last"])
    # The rows of earlier versions, which did not divide the network.
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        network = architecture(name).build(None)[0].eval()
    for kind in ("cls", "mean", "cls+mean", "last4"):
        assert torch.equal(values[kind], undivided_tokens(kind, network, backbone.normalize(images)))
    # The same features from the tokens at a cut, if the blocks after it are read.
    cut = backbone.cut_at("-4")
    assert torch.equal(backbone.refine(backbone.encode(images, cut), cut), values["last4"])
    assert torch.equal(values["cls+mean"], torch.cat([values["cls"], values["mean"]], 1))
    assert torch.equal(values["last4"].chunk(4, 1)[3], values["cls"])
    assert not torch.equal(values["last4"].chunk(4, 1)[2], values["cls"])


@torch.no_grad()
def test_stages_of_a_transformer_are_the_means_of_its_tokens() -> None:
    backbone = load_backbone("timm/test_vit", None).eval()
    backbone.set_features("stages")
    values, expected = backbone.normalize(noise(backbone)), []
    for stage in backbone.stages.values():
        values = stage(values)
        expected.append(values.mean(1) if values.dim() == 3 else values)
    assert len(expected) == 7
    assert torch.equal(backbone(noise(backbone)), torch.cat(expected, 1))


@torch.no_grad()
def test_mean_of_patch_tokens_without_a_class_token() -> None:
    backbone = load_backbone("timm/vit_base_patch32_siglip_256", None).eval()
    backbone.set_features("mean")
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        network: Any = architecture(backbone.name).build(None)[0].eval()
    tokens = network.forward_features(backbone.normalize(noise(backbone)))
    torch.testing.assert_close(backbone(noise(backbone)), tokens.mean(1))
    with pytest.raises(ModelError, match=r"'cls'\. It provides last, stages, mean:"):
        backbone.set_features("cls")


@pytest.mark.parametrize(
    ("name", "kind", "available"),
    [
        ("resnet18", "cls", "last, stages"),
        ("timm/selecsls42", "stages", "last"),
        ("timm/levit_128s", "mean", "last, stages"),
    ],
)
def test_features_that_a_network_does_not_provide(name: str, kind: str, available: str) -> None:
    backbone = load_backbone(name, None)
    with pytest.raises(ModelError, match=f"model.features: {name} does not provide '{kind}'. It provides {available}:"):
        backbone.set_features(kind)  # type: ignore[arg-type]
    assert backbone.features == "last"


def test_last4_needs_four_trainable_blocks_or_none() -> None:
    with pytest.raises(
        ConfigError, match=r"last4 reads the last 4 blocks, but a row at the cut lacks .* before blocks\.3"
    ):
        ImageClassifier("timm/test_vit", None, -3, features="last4")
    for trainable in ("head", "-4", "all"):
        model = ImageClassifier("timm/test_vit", None, trainable, features="last4", classes=["a", "b"])
        assert model.hparams["trainable"] == trainable
        assert model(noise(model.backbone)).shape == (2, 2)


def test_stages_need_all_stages_on_one_side_of_the_cut() -> None:
    with pytest.raises(ConfigError, match=r"--model\.trainable head or all"):
        ImageClassifier("resnet18", None, "layer4", 32, features="stages")
    whole = ImageClassifier("resnet18", None, "all", 32, features="stages", classes=["a", "b"])
    whole(noise(whole.backbone)).sum().backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())


def test_classifiers_with_different_features_share_a_backbone() -> None:
    backbone = load_backbone("resnet18", None, 32)
    narrow = ImageClassifier(backbone, classes=["a", "b"])
    wide = ImageClassifier(backbone, classes=["a", "b"], features="stages")
    assert (narrow.head.in_features, wide.head.in_features) == (512, 1024)
    assert backbone.features == "last"
    assert wide.backbone.sha256 == narrow.backbone.sha256


def test_heat_maps_are_those_of_the_last_maps() -> None:
    backbone, head = load_backbone("resnet18", None, 64).eval(), LinearHead(1024, 3)
    narrow = LinearHead(512, 3)
    with torch.no_grad():
        head.weight[:, -512:], head.weight[:, :-512] = narrow.weight, 0
        head.bias.copy_(narrow.bias)
    expected = heat_maps(backbone, narrow, SingleLabel(), noise(backbone))
    backbone.set_features("stages")
    torch.testing.assert_close(heat_maps(backbone, head, SingleLabel(), noise(backbone)), expected)
