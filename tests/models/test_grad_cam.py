"""Grad-CAM heat maps."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from project.errors import ModelError
from project.models.backbone import Backbone
from project.models.grad_cam import heat_maps
from project.models.heads import LinearHead
from project.models.loading import load_backbone
from project.preprocessing import Preprocessing
from project.task import SingleLabel

PLAIN = Preprocessing(32, 32, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

RANDOM = "ignore:model.weights is null"


class Pool(nn.Module):
    """Mean over the given dimensions."""

    def __init__(self, *sides: int) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(self.sides)


class ChannelsLast(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.movedim(1, -1)


def colour_backbone(*pooling: nn.Module) -> Backbone:
    """A backbone whose 8 x 8 feature maps are the red, green and blue channels."""
    stages = OrderedDict(stem=nn.Sequential(nn.AvgPool2d(4)), top=nn.Sequential(*pooling))
    return Backbone("colours", stages, 3, PLAIN).eval()


def red_and_green_image() -> torch.Tensor:
    """A black image with a red patch at the upper left and a green one at the lower right."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, 0, :8, :8] = 255
    image[0, 1, 24:, 24:] = 255
    return image


@pytest.fixture
def colour_head() -> LinearHead:
    head = LinearHead(3, 3)
    head.load_state_dict({"weight": torch.eye(3) - 0.5, "bias": torch.zeros(3)})
    return head


@pytest.mark.parametrize(
    "pooling", [[Pool(2, 3)], [ChannelsLast(), Pool(1, 2)]], ids=["channels first", "channels last"]
)
def test_heat_maps_locate_each_class(pooling: list[nn.Module], colour_head: LinearHead) -> None:
    image = red_and_green_image().expand(3, -1, -1, -1)
    red, green, blue = heat_maps(colour_backbone(*pooling), colour_head, SingleLabel(), image, torch.tensor([0, 1, 2]))
    assert red[:6, :6].min() > 0.8 and red[16:].max() == 0 and red.max() == 1
    assert green[26:, 26:].min() > 0.8 and green[:16].max() == 0
    assert not blue.any(), "no region contributes to a colour that is absent"


def test_default_class_is_the_predicted_one(colour_head: LinearHead) -> None:
    image = red_and_green_image()
    image[0, 1] //= 2
    backbone = colour_backbone(Pool(2, 3))
    heat = heat_maps(backbone, colour_head, SingleLabel(), image)
    assert torch.equal(heat, heat_maps(backbone, colour_head, SingleLabel(), image, torch.tensor([0])))


@pytest.mark.filterwarnings(RANDOM)
@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_heat_map_of_a_linear_head_equals_the_class_activation_map(trainable: str) -> None:
    # Selvaraju et al., section 3.1: Grad-CAM generalises CAM, which weights the maps by the head's weights.
    backbone = load_backbone("resnet18", None, 64)
    backbone.freeze(backbone.cut_at(trainable))
    backbone.eval()
    head, images = LinearHead(512, 3), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    head.weight.data.abs_()  # the maps are not negative, so all regions contribute to each class
    with torch.no_grad():
        maps = backbone.normalize(images)
        for name, stage in backbone.stages.items():
            maps = stage[0](maps) if name == "layer4" else stage(maps)  # without the pooling
        expected = torch.einsum("bkhw,k->bhw", maps, head.weight[1]).relu()
    with torch.inference_mode():
        heat = heat_maps(backbone, head, SingleLabel(), images, torch.tensor([1, 1]))
    expected = nn.functional.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(heat, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings(RANDOM)
def test_heat_maps_do_not_change_the_network() -> None:
    backbone = load_backbone("resnet18", None, 64)
    backbone.freeze(backbone.cut_at("layer4"))
    head, images = LinearHead(512, 3), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    backbone.eval()
    before = backbone.fingerprint(backbone.cut)
    heat_maps(backbone, head, SingleLabel(), images)
    assert backbone.fingerprint(backbone.cut) == before
    assert all(parameter.grad is None for parameter in [*backbone.parameters(), *head.parameters()])
    assert not any(module._forward_hooks for module in backbone.modules())
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        name for name, _ in backbone.named_parameters() if name.startswith("stages.layer4.")
    }


@pytest.mark.filterwarnings(RANDOM)
@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "timm/convnext_atto", "timm/tf_efficientnet_lite0"],
)
def test_convolutional_networks_have_heat_maps(name: str) -> None:
    backbone = load_backbone(name, None, image_size=96)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    heat = heat_maps(backbone.eval(), nn.Linear(backbone.feature_dim, 4), SingleLabel(), images)
    assert heat.shape == (2, 96, 96) and heat.min() >= 0 and heat.max() <= 1


@pytest.mark.filterwarnings(RANDOM)
def test_vision_transformer_is_rejected() -> None:
    backbone = load_backbone("timm/vit_tiny_patch16_224", None)
    with pytest.raises(ModelError, match="not available for timm/vit_tiny_patch16_224: it does not pool feature maps"):
        heat_maps(backbone.eval(), nn.Linear(192, 2), SingleLabel(), torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


@pytest.mark.filterwarnings(RANDOM)
def test_threads_can_share_a_network() -> None:
    backbone, task = load_backbone("resnet18", None, 32).eval(), SingleLabel()
    head = LinearHead(backbone.feature_dim, 5)
    images = [torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(24)]

    def heat_and_logits(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heat = heat_maps(backbone, head, task, image)
        with torch.inference_mode():
            return heat, head(backbone(image))

    expected = [heat_and_logits(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = [*pool.map(heat_and_logits, images)]
    for (heat, logits), (expected_heat, expected_logits) in zip(results, expected, strict=True):
        assert torch.equal(heat, expected_heat) and torch.equal(logits, expected_logits)
    assert not any(module._forward_hooks for module in backbone.modules())
