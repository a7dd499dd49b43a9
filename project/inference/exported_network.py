"""A trained classifier as a module of plain layers, for export."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn

from project.classifier import ImageClassifier
from project.features.frozen_prefix import FrozenPrefix, StageChain, fold_batch_norm
from project.inference.pillow_resize import require_filter, resample
from project.models.backbone import Backbone, merge_adapters
from project.preprocessing import Preprocessing


class Suffix(nn.Module):
    """Maps rows at the cut to probabilities ``(B, C)``, float32: the trained stages, the head and the activation.

    Args:
        model: The trained classifier; its trained part is copied to the CPU.
        backbone: Its backbone, with merged adapters.
        prefix: Computes the rows.
    """

    def __init__(self, model: ImageClassifier, backbone: Backbone, prefix: FrozenPrefix) -> None:
        super().__init__()
        names = model.cut.trainable
        self.stages = StageChain(
            backbone.readout(names), *(copy.deepcopy(backbone.stages[name]).cpu().float() for name in names)
        )
        self.head = copy.deepcopy(model.head).cpu().float()
        self.eval().requires_grad_(False)
        self._task = model.task
        if names:
            size = backbone.preprocessing.crop
            fold_batch_norm(self.stages, prefix(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Probabilities of rows."""
        return self._task.probabilities(self.head(self.stages(rows)))


class ExportedNetwork(nn.Module):
    """Maps pixels, uint8 ``(B, 3, S, S)``, to probabilities ``(B, C)``, float32.

    It is a copy on the CPU, with merged adapters and folded BatchNorm. The prefix contains the normalization and the
    frozen stages; classifiers of several tasks on one backbone have equal ones.

    Args:
        model: The trained classifier; it is not changed.
    """

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        backbone = merge_adapters(model.backbone)
        self.prefix = FrozenPrefix(backbone, model.cut, layout=torch.contiguous_format)
        self.suffix = Suffix(model, backbone, self.prefix)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Probabilities of images."""
        return cast(torch.Tensor, self.suffix(self.prefix(pixels)))


class WithPreprocessing(nn.Module):
    """Maps images of any size, uint8 ``(N, H, W, 3)``, to the output of a network on the preprocessed pixels.

    The pixels equal those of :func:`project.data.transforms.evaluation`.

    Args:
        network: Takes uint8 ``(N, 3, S, S)``.
        preprocessing: Preprocessing of the weights.

    Raises:
        ConfigError: The file cannot resize with the interpolation of the weights.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        require_filter(preprocessing)
        self.network = network
        self._preprocessing = preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess and run images."""
        settings = self._preprocessing
        sides = images.shape[1:3]
        shorter = cast(int, torch.sym_min(*sides))  # a symbol while torch.export traces
        height, width = (settings.resize if settings.squash else settings.resize * side // shorter for side in sides)
        top, left = (_half_rounded_to_even(side - settings.crop) for side in (height, width))
        narrow = resample(images, width, left, settings.crop, settings.interpolation)
        turned = resample(narrow.permute(0, 3, 2, 1), height, top, settings.crop, settings.interpolation)
        return cast(torch.Tensor, self.network(turned.transpose(2, 3)))


def _half_rounded_to_even(margin: int) -> int:
    """``round(margin / 2)`` in integers, which ``torch.export`` can trace."""
    return (margin + margin // 2 % 2) // 2
