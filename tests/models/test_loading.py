"""Loading a backbone: random weights, image sizes, and skipped random initialization."""

import pytest
import torch
import torchvision

from project.errors import ModelError
from project.models.backbone import Origin
from project.models.loading import SkipRandomInit, load_backbone

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")


def random_images(batch, size):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_random_weights_warn_and_are_recorded_in_the_origin():
    with pytest.warns(UserWarning, match=r"model\.weights is null: shufflenet_v2_x0_5 has random weights"):
        backbone = load_backbone("shufflenet_v2_x0_5", None, 32)
    assert backbone.origin == Origin(None, "random, seed 0", image_size=32)


def test_vit_rejects_other_image_sizes():
    with pytest.raises(ModelError, match=r"model\.image_size: vit_b_32 supports only images of 224 px, not 192\."):
        load_backbone("vit_b_32", None, image_size=192)
    assert load_backbone("vit_b_32", None, image_size=224).preprocessing.crop == 224


def test_vit_uses_the_image_size_of_its_weight_file(tmp_path):
    """Some of torchvision's weights, such as SWAG, use 384 or 512 px."""
    torch.save(torchvision.models.vit_b_32(image_size=64).state_dict(), tmp_path / "small.pth")
    backbone = load_backbone("vit_b_32", str(tmp_path / "small.pth"))
    assert backbone.preprocessing.crop == 64
    assert backbone.eval()(random_images(1, 64)).shape == (1, 768)


@pytest.mark.parametrize(("name", "fixed"), [("maxvit_t", 224), ("timm/test_vit", 160)])
def test_network_with_fixed_size_rejects_other_image_sizes(name, fixed):
    with pytest.raises(ModelError, match=rf"model\.image_size: {name} supports only images of {fixed} px, not 128\."):
        load_backbone(name, None, image_size=128)
    assert load_backbone(name, None).preprocessing.crop == fixed
    assert load_backbone(name, None, image_size=fixed).preprocessing.crop == fixed


def test_other_networks_support_any_image_size():
    backbone = load_backbone("resnet18", None, image_size=96)
    assert (backbone.preprocessing.crop, backbone.preprocessing.resize) == (96, 110)
    assert backbone.eval()(random_images(1, 96)).shape == (1, 512)


def test_skip_random_init_leaves_tensors_and_the_generator_unchanged() -> None:
    before = torch.get_rng_state()
    with SkipRandomInit():
        assert not torch.nn.init.kaiming_normal_(torch.zeros(4, 4)).any()
        assert not torch.nn.init.uniform_(tensor=torch.zeros(4)).any()
        assert not torch.nn.init.trunc_normal_(torch.zeros(4)).any()
    assert torch.equal(torch.get_rng_state(), before)
