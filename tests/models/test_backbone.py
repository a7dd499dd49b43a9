import copy

import pytest
import torch
from torch import nn

from project.errors import ModelError
from project.models.backbone import Backbone, BackboneFactory, Origin, load_backbone
from project.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

SMALL = "mobilenet_v3_small"  # BatchNorm in every stage, and dropout nowhere but before the classifier


def photographs(batch=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def frozen_at(trainable, name="resnet18"):
    """A backbone whose stages train from one on."""
    backbone = load_backbone(name, None)
    backbone.freeze(backbone.cut_at(trainable))
    return backbone


def everything(module):
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def step(backbone):
    """One step of training of whatever will train."""
    backbone.zero_grad()
    features = backbone(photographs())
    features.square().mean().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.grad is not None], lr=0.1).step()


def train_the_backbone(backbone):
    backbone.train()


def train_each_stage(backbone):
    for stage in backbone.stages.values():
        stage.train()


def train_the_stages(backbone):
    backbone.stages.train()
    assert not any(module.training for name in backbone.cut.frozen for module in backbone.stages[name].modules())


def train_every_module(backbone):
    for module in backbone.modules():
        module.train()


def unfreeze_by_hand(backbone):
    backbone.train()
    backbone.requires_grad_(True)
    for module in backbone.modules():
        module.train()
        module.training = True


MEDDLERS = (train_the_backbone, train_the_stages, train_each_stage, train_every_module, unfreeze_by_hand)


@pytest.mark.parametrize("meddle", MEDDLERS)
@pytest.mark.parametrize("name", [SMALL, "resnet18", "timm/tf_efficientnet_lite0", "timm/test_vit"])
def test_frozen_backbone_is_bit_identical_after_train_mode_forward(name, meddle):
    backbone = load_backbone(name, None)
    images = photographs(2, 160 if "vit" in name else 32)
    before, proof = everything(backbone), backbone.fingerprint(backbone.cut)
    features = backbone.eval()(images)
    meddle(backbone)
    for run in (lambda images: backbone.encode(images, backbone.cut), backbone):
        again = run(images)
        assert again.grad_fn is None
        assert not again.requires_grad
        assert torch.equal(again, features)
    assert changed(before, backbone) == set()
    assert backbone.fingerprint(backbone.cut) == proof == backbone.sha256


def test_the_same_network_unfrozen_does_move_its_buffers():
    """What the promise above is worth: the article's ``model.train()`` moves BatchNorm."""
    backbone = frozen_at("all", SMALL)
    before = everything(backbone)
    backbone.train()(photographs())
    assert any(name.endswith("running_mean") for name in changed(before, backbone))


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_prefix_stays_and_suffix_trains_with_the_cut_inside(meddle):
    backbone = frozen_at("layer4")
    before, proof = everything(backbone), backbone.fingerprint(backbone.cut)
    meddle(backbone)
    assert backbone.encode(photographs(), backbone.cut).grad_fn is None
    step(backbone)
    moved = changed(before, backbone)
    assert all(name.startswith("stages.layer4.") for name in moved)
    assert moved == {name for name in before if name.startswith("stages.layer4.")}
    assert backbone.fingerprint(backbone.cut) == proof


def test_train_all_moves_every_stage():
    backbone = frozen_at("all", SMALL)
    before = everything(backbone)
    backbone.train()
    step(backbone)
    assert {name.split(".")[1] for name in changed(before, backbone)} == set(backbone.stages)


@pytest.mark.parametrize(
    ("trainable", "frozen", "training"),
    [
        ("head", ["stem", "layer1", "layer2", "layer3", "layer4"], []),
        ("layer4", ["stem", "layer1", "layer2", "layer3"], ["layer4"]),
        ("layer2", ["stem", "layer1"], ["layer2", "layer3", "layer4"]),
        ("stem", [], ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("all", [], ["stem", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_trainable_puts_the_cut_in_its_place(trainable, frozen, training):
    backbone = frozen_at(trainable)
    assert (list(backbone.cut.frozen), list(backbone.cut.trainable)) == (frozen, training)
    for mode in (backbone.train, backbone.eval, backbone.train):
        mode()
        on = backbone.training
        for name, stage in backbone.stages.items():
            assert {module.training for module in stage.modules()} == {on and name in training}
            assert {parameter.requires_grad for parameter in stage.parameters()} == {name in training}


@pytest.mark.parametrize(
    ("trainable", "shape"),
    [("head", (2, 512)), ("layer4", (2, 256, 4, 4)), ("layer1", (2, 64, 16, 16)), ("all", (2, 3, 64, 64))],
)
def test_rows_at_the_cut_are_what_the_prefix_gives(trainable, shape):
    backbone = frozen_at(trainable)
    whole = load_backbone("resnet18", None)
    images = photographs(2, 64)
    rows = backbone.eval().encode(images, backbone.cut)
    assert rows.shape == shape
    assert torch.equal(backbone.refine(rows, backbone.cut), whole.eval()(images))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "layer5",
            r"resnet18 has no stage 'layer5'\. Did you mean 'layer4', 'layer3' or 'layer2'\? It has stem, layer1",
        ),
        ("haed", r"has no stage 'haed'\. Did you mean 'head'\?"),
        ("", r"has no stage ''\. It has stem, layer1, layer2, layer3, layer4; or say head, or all\."),
        ("Layer4", r"Did you mean 'layer4'"),
    ],
)
def test_unknown_stage_is_refused_with_the_nearest_names(wrong, said):
    with pytest.raises(ModelError, match=said):
        frozen_at(wrong)


def test_a_network_of_one_stage_can_be_frozen_or_trained_whole():
    assert load_backbone("shufflenet_v2_x0_5", None).cut.frozen == ("body",)
    assert frozen_at("all", "shufflenet_v2_x0_5").cut.trainable == ("body",)
    with pytest.raises(ModelError, match=r"It has body; or say head, or all\."):
        frozen_at("layer4", "shufflenet_v2_x0_5")


def test_fingerprint_is_of_the_frozen_stages_and_sha256_of_all():
    head = load_backbone("resnet18", None)
    partial = frozen_at("layer4")
    assert head.sha256 == partial.sha256 == head.fingerprint(head.cut) != partial.fingerprint(partial.cut)
    with torch.no_grad():
        next(partial.stages["layer4"].parameters()).add_(1)
    proof = partial.fingerprint(partial.cut)
    layer4 = frozen_at("layer4")
    assert proof == layer4.fingerprint(layer4.cut)
    with torch.no_grad():
        next(partial.stages["layer3"].parameters()).add_(1)
    assert partial.fingerprint(partial.cut) != proof


def test_copy_of_a_backbone_is_as_frozen():
    backbone = load_backbone(SMALL, None)
    twin = copy.deepcopy(backbone).train()
    twin(photographs())
    assert twin.fingerprint(twin.cut) == backbone.fingerprint(backbone.cut)


def tiny(mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 1.0)):
    return Backbone(
        "tiny", {"body": nn.Flatten()}, 12, Preprocessing(4, 2, "bilinear", mean, std), Origin(None, "none")
    )


def test_normalize_takes_uint8_and_float_alike():
    images = photographs(2, 2)
    backbone = tiny()
    expected = (images.double() / 255 - backbone.mean.double()) / backbone.std.double()
    for given in (images, images.float() / 255, images.double() / 255):
        found = backbone.normalize(given)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=1e-6)


def test_normalize_gives_the_backbones_own_dtype():
    assert tiny().to(torch.bfloat16).normalize(photographs(1, 2)).dtype == torch.bfloat16


def test_a_checkpoint_of_a_backbone_holds_its_stages_alone():
    assert {name.split(".")[0] for name in load_backbone(SMALL, None).state_dict()} == {"stages"}


def test_random_weights_are_told_and_written_down():
    with pytest.warns(UserWarning, match=r"model\.weights is null: shufflenet_v2_x0_5 has random weights"):
        backbone = load_backbone("shufflenet_v2_x0_5", None)
    origin = backbone.origin
    assert (origin.weights, origin.source) == (None, "random, seed 0")


def test_classifiers_share_frozen_stages_and_none_trains_anothers():
    whole = load_backbone("resnet18", None)
    proof = whole.sha256
    one, other = (whole.specialized(whole.cut_at("layer4")) for _ in range(2))
    head = whole.specialized(whole.cut_at("head"))
    for name in ("stem", "layer1", "layer2", "layer3"):
        assert one.stages[name] is other.stages[name] is head.stages[name] is whole.stages[name]
    assert head.stages["layer4"] is whole.stages["layer4"] is not one.stages["layer4"] is not other.stages["layer4"]
    before = everything(other)
    step(one.train())
    assert changed(before, other) == set()
    assert whole.fingerprint(whole.cut) == proof == one.sha256
    assert not any(parameter.requires_grad for parameter in whole.parameters())


def test_a_factory_loads_each_backbone_once():
    factory = BackboneFactory()
    assert factory(SMALL, None, 32) is factory(SMALL, None, 32)
    assert factory(SMALL, None, 64) is not factory(SMALL, None, 32)
    assert factory(SMALL, None, 32).origin == Origin(None, "random, seed 0", image_size=32)
