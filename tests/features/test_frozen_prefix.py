"""Frozen prefix: folding BatchNorm into convolutions does not change the rows."""

import pytest
import torch
from torch import nn

from project.features.frozen_prefix import FrozenPrefix, fold_batch_norm
from project.models.backbone import Backbone
from project.models.loading import load_backbone
from tests.features.test_engines import relative_error


def count_batch_norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize(
    ("name", "remaining"),
    [
        *(("resnet18", 0), ("densenet121", None), ("mobilenet_v3_small", 0), ("timm/tf_efficientnet_lite0", 0)),
        *(("convnext_tiny", 0), ("swin_t", 0), ("googlenet", 0)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_folding_does_not_change_rows(name: str, remaining: int | None) -> None:
    backbone = load_backbone(name, None, 64)
    _randomize_statistics(backbone)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    prefix = FrozenPrefix(backbone, backbone.cut)
    with torch.no_grad():
        exact, rows = backbone(images), prefix(images)
    assert relative_error(rows, exact) < 1e-4
    assert remaining is None or count_batch_norms(prefix) == remaining


def _randomize_statistics(backbone: Backbone) -> None:
    """Set BatchNorm statistics as in a trained network; initial ones are all 0 and 1."""
    torch.manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)


class Forked(nn.Module):
    """A convolution whose output is read by a BatchNorm and by an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(Forked):
    """A convolution that is called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


@pytest.mark.parametrize("network", [Forked, CalledTwice])
@torch.no_grad()
def test_shared_convolution_is_not_folded(network: type[Forked]) -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(network()).eval()
    example = torch.randn(2, 3, 8, 8)
    before = stages(example)
    assert fold_batch_norm(stages, example) == 0
    assert torch.equal(stages(example), before)
    assert count_batch_norms(stages) == 1


@torch.no_grad()
def test_shared_convolution_keeps_the_output_of_the_whole_network() -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Forked()).eval()
    example = torch.randn(2, 3, 8, 8)
    before = stages(example)
    fold_batch_norm(stages, example)
    assert relative_error(stages(example), before) < 1e-6
