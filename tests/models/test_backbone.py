import copy
import re

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from project.errors import ModelError
from project.models.backbone import Backbone, Origin
from project.models.cut import Cut
from project.models.loading import load_backbone
from project.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

SMALL = "mobilenet_v3_small"  # BatchNorm in every stage, dropout only before the classifier


def random_images(batch=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def frozen_before(trainable, name="resnet18"):
    """A backbone with the given first trainable stage."""
    backbone = load_backbone(name, None)
    backbone.freeze(backbone.cut_at(trainable))
    return backbone


def snapshot(module):
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed_tensors(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def step(backbone, images=None):
    """One training step of all trainable parameters."""
    backbone.zero_grad()
    features = backbone(random_images() if images is None else images)
    features.square().mean().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.grad is not None], lr=0.1).step()


def train_backbone(backbone):
    backbone.train()


def train_each_stage(backbone):
    for stage in backbone.stages.values():
        stage.train()


def train_stages(backbone):
    backbone.stages.train()
    assert not any(module.training for name in backbone.cut.frozen for module in backbone.stages[name].modules())


def train_every_module(backbone):
    for module in backbone.modules():
        module.train()


def unfreeze_all(backbone):
    backbone.train()
    backbone.requires_grad_(True)
    for module in backbone.modules():
        module.train()
        module.training = True


TRAIN_CALLS = (train_backbone, train_stages, train_each_stage, train_every_module, unfreeze_all)


@pytest.mark.parametrize("call_train", TRAIN_CALLS)
@pytest.mark.parametrize("name", [SMALL, "resnet18", "timm/tf_efficientnet_lite0", "timm/test_vit"])
def test_frozen_backbone_is_bit_identical_after_train_mode_forward(name, call_train):
    backbone = load_backbone(name, None)
    images = random_images(2, 160 if "vit" in name else 32)
    before, sha256 = snapshot(backbone), backbone.fingerprint(backbone.cut)
    features = backbone.eval()(images)
    call_train(backbone)
    for forward in (lambda images: backbone.encode(images, backbone.cut), backbone):
        output = forward(images)
        assert output.grad_fn is None
        assert not output.requires_grad
        assert torch.equal(output, features)
    assert changed_tensors(before, backbone) == set()
    assert backbone.fingerprint(backbone.cut) == sha256 == backbone.sha256


def test_unfrozen_backbone_changes_its_buffers_in_train_mode():
    """The article's ``model.train()`` updates BatchNorm, so the test above can fail."""
    backbone = frozen_before("all", SMALL)
    before = snapshot(backbone)
    backbone.train()(random_images())
    assert any(name.endswith("running_mean") for name in changed_tensors(before, backbone))


@pytest.mark.parametrize("call_train", TRAIN_CALLS)
def test_partial_training_changes_only_the_suffix(call_train):
    backbone = frozen_before("layer4")
    before, sha256 = snapshot(backbone), backbone.fingerprint(backbone.cut)
    call_train(backbone)
    assert backbone.encode(random_images(), backbone.cut).grad_fn is None
    step(backbone)
    assert changed_tensors(before, backbone) == {name for name in before if name.startswith("stages.layer4.")}
    assert backbone.fingerprint(backbone.cut) == sha256


@pytest.mark.parametrize("call_train", TRAIN_CALLS)
@pytest.mark.parametrize("name", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_affine_weights(name, call_train):
    backbone = frozen_before("all", name)
    backbone.set_batch_norm("frozen")
    before = snapshot(backbone)
    call_train(backbone)
    step(backbone)
    changed = changed_tensors(before, backbone)
    assert not {key for key in changed if "running_" in key or "num_batches" in key}
    assert {key for key in changed if "bn" in key and key.endswith("weight")}
    backbone.set_batch_norm("train")
    call_train(backbone)
    step(backbone)
    assert {key for key in changed_tensors(before, backbone) if key.endswith("running_var")}


def test_frozen_batch_norm_leaves_stochastic_depth_and_dropout_active():
    backbone = frozen_before("all", "efficientnet_b0")
    backbone.set_batch_norm("frozen")
    modules = [*backbone.train().modules()]
    assert any(isinstance(module, nn.BatchNorm2d) for module in modules)
    drops = [module for module in modules if isinstance(module, StochasticDepth)]
    assert drops and all(module.training and module.p > 0 for module in drops[1:])
    outputs = {float(backbone(random_images(8, 64)).sum().detach()) for _ in range(2)}
    assert len(outputs) == 2, "the same images, with other random depths"


def test_full_training_changes_every_stage():
    backbone = frozen_before("all", SMALL)
    before = snapshot(backbone)
    backbone.train()
    step(backbone)
    assert {name.split(".")[1] for name in changed_tensors(before, backbone)} == set(backbone.stages)


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/vit_small_patch16_dinov3"])
def test_cut_inside_a_transformer_trains_its_last_blocks(name):
    backbone = load_backbone(name, None)
    images = random_images(2, backbone.preprocessing.crop)
    whole = backbone.eval()(images)
    cut = backbone.cut_at("-2")
    last = len(backbone.stages) - 2
    assert cut.trainable == (f"blocks.{last - 1}", f"blocks.{last}")
    copied = backbone.specialized(cut)
    rows = copied.eval().encode(images, cut)
    assert rows.dim() == 3 and len(rows) == 2 and rows.grad_fn is None
    assert torch.equal(copied.refine(rows, cut), whole)
    before, sha256 = snapshot(copied), copied.fingerprint(cut)
    copied.train()
    step(copied, images)
    assert {name.split(".")[1] for name in changed_tensors(before, copied)} == {f"blocks_{last - 1}", f"blocks_{last}"}
    assert copied.fingerprint(cut) == sha256
    assert torch.equal(backbone.eval()(images), whole)
    assert {name for name, stage in copied.stages.items() if stage.training} == set(cut.trainable)


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
def test_trainable_sets_mode_and_requires_grad_of_each_stage(trainable, frozen, training):
    backbone = frozen_before(trainable)
    assert (list(backbone.cut.frozen), list(backbone.cut.trainable)) == (frozen, training)
    for mode in (backbone.train, backbone.eval, backbone.train):
        mode()
        for name, stage in backbone.stages.items():
            assert {module.training for module in stage.modules()} == {backbone.training and name in training}
            assert {parameter.requires_grad for parameter in stage.parameters()} == {name in training}


@pytest.mark.parametrize(
    ("trainable", "shape"),
    [("head", (2, 512)), ("layer4", (2, 256, 4, 4)), ("layer1", (2, 64, 16, 16)), ("all", (2, 3, 64, 64))],
)
def test_encode_then_refine_equals_forward_at_any_cut(trainable, shape):
    backbone = frozen_before(trainable)
    whole = load_backbone("resnet18", None)
    images = random_images(2, 64)
    rows = backbone.eval().encode(images, backbone.cut)
    assert rows.shape == shape
    assert torch.equal(backbone.refine(rows, backbone.cut), whole.eval()(images))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "layer5",
            r"resnet18 has no stage 'layer5'\. Did you mean 'layer4', 'layer3' or 'layer2'\? Use one of stem, layer1",
        ),
        ("haed", r"has no stage 'haed'\. Did you mean 'head'\?"),
        ("", r"has no stage ''\. Use one of stem, layer1, layer2, layer3, layer4, head or all\."),
        ("Layer4", r"Did you mean 'layer4'"),
    ],
)
def test_unknown_stage_is_rejected_with_similar_names(stage, message):
    with pytest.raises(ModelError, match=message):
        frozen_before(stage)


def test_single_stage_network_can_be_frozen_or_trained_as_a_whole():
    assert load_backbone("timm/tnt_s_legacy_patch16_224", None).cut.frozen == ("body",)
    for trainable in ("all", "body", "-1"):
        assert frozen_before(trainable, "timm/tnt_s_legacy_patch16_224").cut.trainable == ("body",)
    with pytest.raises(ModelError, match=r"Use one of body, head or all\."):
        frozen_before("layer4", "timm/tnt_s_legacy_patch16_224")


def test_negative_number_trains_the_last_stages():
    stages = ("stem", "blocks.0", "blocks.1", "blocks.2")
    for trainable, count in {"-1": 1, "-2": 2, "-4": 4, "blocks.2": 1, "head": 0, "all": 4}.items():
        cut = Cut.at(stages, trainable, "net")
        assert cut.frozen + cut.trainable == stages and len(cut.trainable) == count
    # Earlier versions did not divide all networks: this name still trains the whole network.
    assert Cut.at(stages, "body", "net").trainable == stages


@pytest.mark.parametrize("number", ["-5", "0", "2", "-0", "+1"])
def test_number_out_of_range_is_rejected(number):
    stages = ("stem", "blocks.0", "blocks.1", "blocks.2")
    with pytest.raises(
        ModelError, match=rf"net has 4 stages, so {re.escape(number)} is out of range. Use -1 to -4 for the last"
    ):
        Cut.at(stages, number, "net")
    with pytest.raises(ModelError, match=r"model\.schedule: net has 1 stage, so -2 is out of range. Use -1 for the"):
        Cut.at(["body"], "-2", "net", "model.schedule")


def test_fingerprint_covers_the_frozen_stages_and_sha256_all_stages():
    head = load_backbone("resnet18", None)
    partial = frozen_before("layer4")
    assert head.sha256 == partial.sha256 == head.fingerprint(head.cut) != partial.fingerprint(partial.cut)
    with torch.no_grad():
        next(partial.stages["layer4"].parameters()).add_(1)
    sha256 = partial.fingerprint(partial.cut)
    layer4 = frozen_before("layer4")
    assert sha256 == layer4.fingerprint(layer4.cut)
    with torch.no_grad():
        next(partial.stages["layer3"].parameters()).add_(1)
    assert partial.fingerprint(partial.cut) != sha256


def test_copy_of_a_backbone_stays_frozen():
    backbone = load_backbone(SMALL, None)
    clone = copy.deepcopy(backbone).train()
    clone(random_images())
    assert clone.fingerprint(clone.cut) == backbone.fingerprint(backbone.cut)


def tiny_backbone(mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 1.0)):
    return Backbone(
        "tiny", {"body": nn.Flatten()}, 12, Preprocessing(4, 2, "bilinear", mean, std), Origin(None, "none")
    )


def test_normalize_gives_equal_results_for_uint8_and_float():
    images = random_images(2, 2)
    backbone = tiny_backbone()
    expected = (images.double() / 255 - backbone.mean.double()) / backbone.std.double()
    for values in (images, images.float() / 255, images.double() / 255):
        normalized = backbone.normalize(values)
        assert normalized.dtype == torch.float32
        assert torch.allclose(normalized.double(), expected, atol=1e-6)


def test_normalize_returns_the_dtype_of_the_backbone():
    assert tiny_backbone().to(torch.bfloat16).normalize(random_images(1, 2)).dtype == torch.bfloat16


def test_state_dict_contains_only_the_stages():
    assert {name.split(".")[0] for name in load_backbone(SMALL, None).state_dict()} == {"stages"}


def test_specialized_backbones_share_frozen_stages_and_train_their_own_copies():
    whole = load_backbone("resnet18", None)
    one, other = (whole.specialized(whole.cut_at("layer4")) for _ in range(2))
    head = whole.specialized(whole.cut_at("head"))
    for name in ("stem", "layer1", "layer2", "layer3"):
        assert one.stages[name] is other.stages[name] is head.stages[name] is whole.stages[name]
    assert head.stages["layer4"] is whole.stages["layer4"] is not one.stages["layer4"] is not other.stages["layer4"]
    before = snapshot(other)
    step(one.train())
    assert changed_tensors(before, other) == set()
    assert whole.fingerprint(whole.cut) == whole.sha256 == one.sha256
    assert not any(parameter.requires_grad for parameter in whole.parameters())
