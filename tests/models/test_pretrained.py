"""Pretrained stages are copied, or loaded again if a fit has changed them."""

from pathlib import Path

import torch

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


def test_weights_that_cannot_be_loaded_again_are_unknown(weights: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied.pth"
    copied.write_bytes(weights.read_bytes())
    backbone = load_backbone(BACKBONE, str(copied))
    copied.unlink()
    assert pretrained_stages(backbone, ["layer4"]) is not None
    next(backbone.stages["layer4"].parameters()).data.add_(1)
    assert pretrained_stages(backbone, ["layer4"]) is None
