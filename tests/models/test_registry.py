import gc

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from project.errors import ModelError, WeightsError
from project.models.backbone import load_backbone
from project.models.registry import architecture

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

ZOO = torchvision.models.list_models(module=torchvision.models)
#: Smallest sides that these take; all others take 32 px. The ViTs and MaxViT take one size only.
SIDES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
GIANTS = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
#: Building these two takes 25 s; their families have smaller members here.
LONG = ("regnet_y_128gf", "vit_h_14")


class WithoutDice(TorchFunctionMode):
    """Fills weights with 1 / fan-in where an initialiser would draw them.

    Two thirds of a giant's time goes into drawing its 300 to 640 million numbers, several times over. With these ones
    each layer is an average of what comes in, so values stay finite; memory, shapes and forward are the real ones.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].fill_(1 / args[0][0].numel())
        return func(*args, **(kwargs or {}))


def pictures(batch, size):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def memory():
    """Give a network's memory back before the next is built."""
    yield
    gc.collect()


def test_the_zoo_is_all_of_torchvision():
    assert len(ZOO) >= 80


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in ZOO])
def test_every_classifier_of_torchvision_is_a_backbone(name, memory):
    if name in GIANTS:
        with WithoutDice():
            backbone = load_backbone(name, None)
    else:
        backbone = load_backbone(name, None)
    size = backbone.preprocessing.crop if name.startswith("vit") else SIDES.get(name, 32)
    batch = 1 if name.startswith("vit") else 2
    features = backbone.eval()(pictures(batch, size))
    assert features.shape == (batch, backbone.feature_dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert features.any()
    assert features.grad_fn is None
    assert not features.requires_grad
    # None of ImageNet's 1000 classes is left: every classifier is gone, auxiliary ones included.
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
def test_feature_dim_is_what_the_papers_say(name, width):
    assert load_backbone(name, None).feature_dim == width


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet5", r"unknown backbone 'resnet5'\. Did you mean 'resnet50'"),
        ("ResNet-50", r"unknown backbone 'ResNet-50'\. Did you mean .*'resnet50'"),
        ("tf_efficientnet_lite0", r"Did you mean 'timm/tf_efficientnet_lite0'"),
        ("quux!", r"unknown backbone 'quux!'\. Known: torchvision's names, timm/NAME\."),
        ("fcn_resnet50", r"unknown backbone 'fcn_resnet50'"),  # torchvision's, but no classifier
        ("timm/resnet5", r"timm has no 'resnet5'\. Did you mean .*'resnet50'"),
        ("timm/", r"timm has no ''"),
        ("timm/resnet18.a9_in1k", r"timm/resnet18 has no tag 'a9_in1k', but .*a1_in1k"),
    ],
)
def test_unknown_backbone_is_refused_with_the_nearest_names(name, said):
    with pytest.raises(ModelError, match=said):
        load_backbone(name, None)


@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_unknown_weights_are_refused_with_those_there_are(name):
    with pytest.raises(
        WeightsError, match=rf"{name} has no weights 'IMAGENET'\. It has .*DEFAULT; or give a file, pkg:NAME"
    ):
        load_backbone(name, "IMAGENET")


def test_inception_has_no_auxiliary_head_and_normalises_as_its_weights_were_trained():
    backbone = load_backbone("inception_v3", None)
    (inception,) = backbone.stages.values()
    assert not [name for name in backbone.state_dict() if "aux" in name.lower()]
    assert inception.transform_input
    assert (backbone.preprocessing.crop, backbone.preprocessing.resize) == (299, 342)
    # In train mode, with an auxiliary head, its own forward would give a pair.
    assert backbone.train()(pictures(1, 75)).shape == (1, 2048)


def test_inception_that_trains_whole_gives_plain_features():
    backbone = load_backbone("inception_v3", None)
    backbone.freeze(backbone.cut_at("all"))
    assert backbone.train()(pictures(2, 75)).shape == (2, 2048)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_file_with_auxiliary_heads_loads(name):
    original = torchvision.models.get_model(name, weights=None, init_weights=False, transform_input=True)
    assert any(key.lower().startswith("aux") for key in original.state_dict())
    model, _ = architecture(name).build(dict(original.state_dict()))
    own = original.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())


def test_vit_takes_its_own_size_only():
    with pytest.raises(ModelError, match=r"model\.image_size: vit_b_32 takes images of 224 px only, not 192\."):
        load_backbone("vit_b_32", None, image_size=192)
    assert load_backbone("vit_b_32", None, image_size=224).preprocessing.crop == 224


def test_vit_takes_the_size_that_its_file_was_trained_at(tmp_path):
    """Some of torchvision's own weights, such as SWAG's, are of 384 or 512 px."""
    torch.save(torchvision.models.vit_b_32(image_size=64).state_dict(), tmp_path / "small.pth")
    backbone = load_backbone("vit_b_32", str(tmp_path / "small.pth"))
    assert backbone.preprocessing.crop == 64
    assert backbone.eval()(pictures(1, 64)).shape == (1, 768)


@pytest.mark.parametrize(("name", "fixed"), [("maxvit_t", 224), ("timm/test_vit", 160)])
def test_network_of_one_size_refuses_another(name, fixed):
    with pytest.raises(ModelError, match=rf"model\.image_size: {name} takes images of {fixed} px only, not 128\."):
        load_backbone(name, None, image_size=128)
    assert load_backbone(name, None).preprocessing.crop == fixed
    assert load_backbone(name, None, image_size=fixed).preprocessing.crop == fixed


def test_other_networks_take_any_size():
    backbone = load_backbone("resnet18", None, image_size=96)
    assert (backbone.preprocessing.crop, backbone.preprocessing.resize) == (96, 110)
    assert backbone.eval()(pictures(1, 96)).shape == (1, 512)


def test_densenets_file_with_old_names_loads():
    """torchvision's own files are of 2017: ``denselayer1.norm.1.weight``."""
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
    """Files of before PyTorch 0.4.1 have no ``num_batches_tracked``."""
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


def test_file_of_a_network_without_classifier_loads():
    for name in ("shufflenet_v2_x0_5", "timm/test_resnet"):
        original, _ = architecture(name).build(None)
        model, _ = architecture(name).build(dict(original.state_dict()))
        assert all(torch.equal(tensor, original.state_dict()[key]) for key, tensor in model.state_dict().items())
