"""Parameter groups: learning rates by depth, and no weight decay on norms, biases, tokens and positions."""

from typing import Any

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim import Optimizer

from project.errors import ConfigError
from project.models.heads import CosineHead, LinearHead, MLPHead
from project.models.optimizers import construct_optimizer
from project.models.parameter_groups import stage_groups


def network() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    return {
        "layer3": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "pool": nn.Flatten(),
        "layer4": nn.Sequential(nn.BatchNorm1d(4), frozen),
        "head": LinearHead(4, 2),
    }


def optimizer_of(lr_decay: float = 1.0, name: str = "torch.optim.SGD", **arguments: Any) -> Optimizer:
    spec = {"class_path": name, "init_args": {"lr": 0.1, **arguments}}
    return construct_optimizer({"optimizer": spec, "scheduler": None, "lr_decay": lr_decay}, stage_groups(network()))[0]


def not_decayed(module: nn.Module) -> set[str]:
    (group,) = stage_groups({"head": module})
    names = [name for name, _ in module.named_parameters()]
    return {name for name, decayed in zip(names, group["decayed"], strict=True) if not decayed}


def test_each_stage_has_a_fraction_of_the_next_ones_learning_rate() -> None:
    groups = optimizer_of(0.5).param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("layer3", 0.025), ("layer4", 0.05), ("head", 0.1)]


def test_groups_are_split_only_by_an_optimizer_that_decays_weights() -> None:
    assert [group["name"] for group in optimizer_of().param_groups] == ["layer3", "layer4", "head"]
    groups = optimizer_of(0.5, weight_decay=0.2).param_groups
    assert [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("layer3", 0.025, 0.2, 1),
        ("layer3 (no decay)", 0.025, 0, 3),
        ("layer4 (no decay)", 0.05, 0, 2),
        ("head", 0.1, 0.2, 1),
        ("head (no decay)", 0.1, 0, 1),
    ]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "timm.optim.Lamb"])
def test_every_optimizer_with_a_weight_decay_decays_only_weights(name: str) -> None:
    optimizer = optimizer_of(1, name if "." in name else f"torch.optim.{name}", weight_decay=0.5)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.fill_(1)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (parameter == 1).all() == ("no decay" in group["name"]), group["name"]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (LinearHead(4, 1), {"bias"}),
        (CosineHead(4, 2), {"scale"}),
        (MLPHead(4, 2, 8), {"0.weight", "0.bias", "1.bias", "4.bias"}),
        (nn.Sequential(nn.LayerNorm([3, 4])), {"0.weight", "0.bias"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_decayed_parameters_of_heads(head: nn.Module, expected: set[str]) -> None:
    assert not_decayed(head) == expected


def test_tokens_and_positions_of_transformers_are_not_decayed() -> None:
    vit = timm.create_model("test_vit", reg_tokens=4, class_token=True)
    exempt = not_decayed(vit)
    assert exempt >= {"pos_embed", "cls_token", "reg_token", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"}
    weights = {name for name, value in vit.named_parameters() if name.endswith("weight") and value.dim() > 1}
    assert weights == {name for name, _ in vit.named_parameters()} - exempt
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2))
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in not_decayed(swin)


def test_optimizer_with_one_learning_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_decay: LBFGS has one learning rate"):
        optimizer_of(0.5, "torch.optim.LBFGS")
    with pytest.raises(ConfigError, match="lr_decay: Adafactor has no learning rate to multiply"):
        optimizer_of(0.5, "timm.optim.Adafactor", lr=None)
