import gc
import re

import pytest
import torch
import torchvision
from torch import nn

from project.errors import ModelError, WeightsError
from project.models.loading import load_backbone
from project.models.registry import architecture
from tests.models.fast_init import FastInit

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

ZOO = torchvision.models.list_models(module=torchvision.models)
#: Minimum image sizes above 32 px; MaxViT and the ViTs support only one size.
MINIMUM_SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
#: Long tests: smaller networks of the same families are tested in every run.
LARGER = re.compile(
    r"convnext_(base|large|small)|densenet(161|169|201)|efficientnet_(b[2-7]|v2_[ml])|regnet_[xy]_(\d\dgf|8gf|128gf|3_2gf)"
    r"|resnet(101|152)|resnext101.*|swin(_v2)?_[bs]|vgg(13|16|19)(_bn)?|vit_[hl]_.*|wide_resnet101_2"
)


def random_images(batch, size):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def free_memory():
    """Free a network's memory before the next one is built."""
    yield
    gc.collect()


def test_zoo_lists_all_torchvision_classifiers():
    assert len(ZOO) >= 80


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * bool(LARGER.fullmatch(name))) for name in ZOO]
)
def test_every_torchvision_classifier_can_be_a_backbone(name, free_memory, monkeypatch):
    for name_of_hash in ("fingerprint", "fingerprint_tensors"):  # reading 12 GB takes long
        monkeypatch.setattr(f"project.models.backbone.{name_of_hash}", lambda tensors: "")
    with FastInit():
        backbone = load_backbone(name, None)
    size = backbone.preprocessing.crop if name.startswith("vit") else MINIMUM_SIZES.get(name, 32)
    batch = 1 if name.startswith("vit") else 2
    features = backbone.eval()(random_images(batch, size))
    assert features.shape == (batch, backbone.feature_dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert features.any()
    assert features.grad_fn is None
    assert not features.requires_grad
    # Every classifier of ImageNet's 1000 classes is removed, auxiliary ones included.
    assert not any(
        isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == 1000 for module in backbone.modules()
    )


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet50", 2048),
        ("vgg16", 4096),
        ("inception_v3", 2048),
        ("densenet121", 1024),
        ("squeezenet1_1", 512),
        ("timm/tf_efficientnet_lite0", 1280),
        ("timm/mobilenetv3_small_050", 1024),
        ("timm/test_vit", 64),
    ],
)
def test_feature_dim_matches_the_papers(name, width):
    assert load_backbone(name, None).feature_dim == width


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", r"unknown backbone 'resnet5'\. Did you mean 'resnet50'"),
        ("ResNet-50", r"unknown backbone 'ResNet-50'\. Did you mean .*'resnet50'"),
        ("tf_efficientnet_lite0", r"Did you mean 'timm/tf_efficientnet_lite0'"),
        ("quux!", r"unknown backbone 'quux!'\. Use the name of a torchvision classifier, or timm/NAME\."),
        ("fcn_resnet50", r"unknown backbone 'fcn_resnet50'"),  # a torchvision network, but not a classifier
        ("timm/resnet5", r"timm has no 'resnet5'\. Did you mean .*'resnet50'"),
        ("timm/", r"timm has no ''"),
        ("timm/resnet18.a9_in1k", r"timm/resnet18 has no tag 'a9_in1k'\. Available: .*a1_in1k"),
    ],
)
def test_unknown_backbone_is_rejected_with_similar_names(name, message):
    with pytest.raises(ModelError, match=message):
        load_backbone(name, None)


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_unknown_weights_are_rejected_with_the_available_names(name):
    with pytest.raises(
        WeightsError, match=rf"{name} has no weights 'IMAGENET'\. Available: .*DEFAULT\. Or pass a file, pkg:NAME"
    ):
        load_backbone(name, "IMAGENET")


def test_inception_has_no_auxiliary_head_and_the_normalisation_of_its_weights():
    backbone = load_backbone("inception_v3", None)
    assert not [name for name in backbone.state_dict() if "aux" in name.lower()]
    assert backbone.stages["stem"].network.transform_input
    assert (backbone.preprocessing.crop, backbone.preprocessing.resize) == (299, 342)
    # In train mode, Inception with an auxiliary head would return a tuple.
    assert backbone.train()(random_images(1, 75)).shape == (1, 2048)


def test_fully_trainable_inception_returns_a_tensor():
    backbone = load_backbone("inception_v3", None)
    backbone.freeze(backbone.cut_at("all"))
    assert backbone.train()(random_images(2, 75)).shape == (2, 2048)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_file_with_auxiliary_heads_loads(name):
    original = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    assert any(key.lower().startswith("aux") for key in original.state_dict())
    model, _ = architecture(name).build(dict(original.state_dict()))
    expected = original.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_densenet_file_with_old_names_loads():
    """torchvision's files date from 2017: ``denselayer1.norm.1.weight``."""
    original = torchvision.models.densenet121().state_dict()
    old = {}
    for key, tensor in original.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if ".denselayer" in key else key
        old[key] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    model, _ = architecture("densenet121").build(dict(old))
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


def test_file_without_batch_counters_loads():
    """Files from before PyTorch 0.4.1 have no ``num_batches_tracked``."""
    original = torchvision.models.shufflenet_v2_x0_5().state_dict()
    old = {key: tensor for key, tensor in original.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(original)
    model, _ = architecture("shufflenet_v2_x0_5").build(dict(old))
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1", "timm/test_resnet"])
def test_file_with_any_number_of_classes_loads(name, classes):
    arch = architecture(name)
    if name.startswith("timm/"):
        import timm

        original = timm.create_model(name.removeprefix("timm/"), num_classes=classes).state_dict()
    else:
        original = torchvision.models.get_model(name, weights=None, num_classes=classes).state_dict()
    model, _ = arch.build(dict(original))
    assert len(model.state_dict()) == len(original) - 2
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


def test_file_without_classifier_loads():
    for name in ("shufflenet_v2_x0_5", "timm/test_resnet"):
        original, _ = architecture(name).build(None)
        model, _ = architecture(name).build(dict(original.state_dict()))
        assert all(torch.equal(tensor, original.state_dict()[key]) for key, tensor in model.state_dict().items())
