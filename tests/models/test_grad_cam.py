"""Heat maps: where a network sees a class."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from project.errors import ModelError
from project.models.backbone import Backbone, load_backbone
from project.models.grad_cam import heat_maps
from project.models.heads import LinearHead
from project.preprocessing import Preprocessing
from project.task import SingleLabel

PLAIN = Preprocessing(32, 32, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

RANDOM = "ignore:model.weights is null"


class Pool(nn.Module):
    """The mean over all places; maps may have their channels last."""

    def __init__(self, *sides: int) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(self.sides)


class ChannelsLast(nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.movedim(1, -1)


def colours(*more: nn.Module) -> Backbone:
    """Its three features are how much red, green and blue there is, on a grid of 8 x 8 places."""
    stages = OrderedDict(stem=nn.Sequential(nn.AvgPool2d(4)), top=nn.Sequential(*more))
    return Backbone("colours", stages, 3, PLAIN).eval()


def coloured() -> torch.Tensor:
    """A black image with a red patch at its upper left and a green one at its lower right."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, 0, :8, :8] = 255
    image[0, 1, 24:, 24:] = 255
    return image


@pytest.fixture
def by_colour() -> LinearHead:
    head = LinearHead(3, 3)
    head.load_state_dict({"weight": torch.eye(3) - 0.5, "bias": torch.zeros(3)})
    return head


@pytest.mark.parametrize("more", [[Pool(2, 3)], [ChannelsLast(), Pool(1, 2)]], ids=["channels first", "channels last"])
def test_each_class_is_seen_where_it_is(more: list[nn.Module], by_colour: LinearHead) -> None:
    image = coloured().expand(3, -1, -1, -1)
    red, green, blue = heat_maps(colours(*more), by_colour, SingleLabel(), image, torch.tensor([0, 1, 2]))
    assert red[:6, :6].min() > 0.8 and red[16:].max() == 0 and red.max() == 1
    assert green[26:, 26:].min() > 0.8 and green[:16].max() == 0
    assert not blue.any(), "nothing speaks for a colour that is not there"


def test_the_likeliest_class_is_looked_for_unless_one_is_named(by_colour: LinearHead) -> None:
    image = coloured()
    image[0, 1] //= 2
    backbone = colours(Pool(2, 3))
    likeliest = heat_maps(backbone, by_colour, SingleLabel(), image)
    assert torch.equal(likeliest, heat_maps(backbone, by_colour, SingleLabel(), image, torch.tensor([0])))


@pytest.mark.filterwarnings(RANDOM)
@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_of_a_linear_head_it_is_the_class_activation_map(trainable: str) -> None:
    # Selvaraju and others, section 3.1: Grad-CAM generalises CAM, the maps weighted by the head's own weights.
    backbone = load_backbone("resnet18", None, 64)
    backbone.freeze(backbone.cut_at(trainable))
    backbone.eval()
    head, images = LinearHead(512, 3), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    head.weight.data.abs_()  # so that all places, which are not negative, speak for each class
    with torch.no_grad():
        maps = backbone.normalize(images)
        for name, stage in backbone.stages.items():
            maps = stage[0](maps) if name == "layer4" else stage(maps)  # without the pooling
        expected = torch.einsum("bkhw,k->bhw", maps, head.weight[1]).relu()
    with torch.inference_mode():
        found = heat_maps(backbone, head, SingleLabel(), images, torch.tensor([1, 1]))
    expected = nn.functional.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings(RANDOM)
def test_the_network_is_left_as_it_was() -> None:
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
def test_networks_that_pool_maps_have_them(name: str) -> None:
    backbone = load_backbone(name, None, image_size=96)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    found = heat_maps(backbone.eval(), nn.Linear(backbone.feature_dim, 4), SingleLabel(), images)
    assert found.shape == (2, 96, 96) and found.min() >= 0 and found.max() <= 1


@pytest.mark.filterwarnings(RANDOM)
def test_a_transformer_says_that_it_has_none() -> None:
    backbone = load_backbone("timm/vit_tiny_patch16_224", None)
    with pytest.raises(ModelError, match="no heat map of timm/vit_tiny_patch16_224: it pools no maps"):
        heat_maps(backbone.eval(), nn.Linear(192, 2), SingleLabel(), torch.zeros(1, 3, 224, 224, dtype=torch.uint8))


@pytest.mark.filterwarnings(RANDOM)
def test_threads_share_a_network() -> None:
    backbone, task = load_backbone("resnet18", None, 32).eval(), SingleLabel()
    head = LinearHead(backbone.feature_dim, 5)
    images = [torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(24)]

    def look(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heat = heat_maps(backbone, head, task, image)
        with torch.inference_mode():
            return heat, head(backbone(image))

    wanted = [look(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(look, images)]
    for (heat, logits), (other_heat, other_logits) in zip(found, wanted, strict=True):
        assert torch.equal(heat, other_heat) and torch.equal(logits, other_logits)
    assert not any(module._forward_hooks for module in backbone.modules())
