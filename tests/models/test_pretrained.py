"""Pretrained stages are copied, or loaded again if a fit has changed them."""

from pathlib import Path

import pytest
import torch

from project.models.adapters import make_adapter
from project.models.backbone import Backbone
from project.models.loading import load_backbone
from project.models.pretrained import pretrained_stages
from tests.conftest import BACKBONE


def tensors(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.stages["layer4"].state_dict().items()}


def test_changed_stages_are_loaded_again(weights: Path) -> None:
    backbone = load_backbone(BACKBONE, str(weights)).to(memory_format=torch.channels_last)
    expected = tensors(backbone)
    for changed in (False, True):
        stages = pretrained_stages(backbone, ["layer4"])
        assert stages is not None and list(stages) == ["layer4"]
        assert not stages["layer4"].training and not any(p.requires_grad for p in stages["layer4"].parameters())
        for name, tensor in stages["layer4"].state_dict().items():
            assert torch.equal(tensor, expected[name]), (name, changed)
            assert tensor.stride() == backbone.stages["layer4"].state_dict()[name].stride()
        for parameter in backbone.stages["layer4"].parameters():
            parameter.data.add_(1)  # the copies do not share it


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_adapted_stages_are_loaded_without_the_adapter(weights: Path, layout: torch.memory_format) -> None:
    backbone = load_backbone(BACKBONE, str(weights)).to(memory_format=layout)  # type: ignore[call-overload]
    expected, strides = tensors(backbone), {name: value.stride() for name, value in tensors(backbone).items()}
    adapter = make_adapter("lora")
    assert adapter is not None
    backbone.adapt(adapter, backbone.cut_at("layer4"))
    for parameter in backbone.stages["layer4"].parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    stages = pretrained_stages(backbone, ["layer4"])
    assert stages is not None
    values = stages["layer4"].state_dict()
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], tensor) for name, tensor in expected.items())
    assert {name: value.stride() for name, value in values.items()} == strides


def test_weights_that_cannot_be_loaded_again_are_unknown(weights: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.pth"
    copied.write_bytes(weights.read_bytes())
    backbone = load_backbone(BACKBONE, str(copied))
    copied.unlink()
    assert pretrained_stages(backbone, ["layer4"]) is not None
    next(backbone.stages["layer4"].parameters()).data.add_(1)
    assert pretrained_stages(backbone, ["layer4"]) is None
