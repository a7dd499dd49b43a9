"""A trained classifier as a module of plain layers, for export."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from project.classifier import ImageClassifier
from project.evaluation.answers.calibration import Answers
from project.evaluation.answers.temperature import SMALLEST
from project.evaluation.answers.unknown_images import NEIGHBORS
from project.features.frozen_prefix import FrozenPrefix, StageChain, fold_batch_norm
from project.inference.pillow_resize import require_filter, resample
from project.models.backbone import Backbone, merge_adapters
from project.preprocessing import Preprocessing
from project.task import Task

#: Names of the outputs, in this order; files of classifiers without calibrated answers have the first one only.
OUTPUTS = ("probabilities", "calibrated_probabilities", "distances")


class NeighborDistance(nn.Module):
    """Maps features to the distance that detects unknown images, float32 ``(B,)``.

    See :func:`project.evaluation.answers.unknown_images.distances`.

    Args:
        rows: Features of training images, int8 ``(M, D)``.
    """

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(rows))
        self._neighbors = min(NEIGHBORS, len(rows))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Distances of features ``(B, D)``."""
        smallest = torch.finfo(torch.float32).tiny
        units = functional.normalize(self.get_buffer("rows").float(), eps=smallest)
        similarity = functional.normalize(features, eps=smallest) @ units.T
        return 1 - similarity.topk(self._neighbors).values[:, -1]


class TemperatureScaling(nn.Module):
    """Maps probabilities ``(B, C)`` to those at a temperature.

    See :func:`project.evaluation.answers.temperature.scaled`.

    Args:
        task: Has the activation.
        temperature: The temperature.
    """

    def __init__(self, task: Task, temperature: float) -> None:
        super().__init__()
        self._task = task
        self._temperature = temperature

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities ``(B, C)``, float32."""
        return self._task.probabilities(probabilities.clamp(min=SMALLEST).log() / self._temperature)


class CalibratedOutputs(nn.Module):
    """Maps the probabilities and the features of images to the outputs that need calibrated answers.

    Args:
        task: Has the activation.
        answers: The calibrated answers.
    """

    def __init__(self, task: Task, answers: Answers) -> None:
        super().__init__()
        self.scaling = TemperatureScaling(task, answers.temperature)
        self.distance = NeighborDistance(answers.rows)

    def forward(self, probabilities: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibrated probabilities ``(B, C)`` and distances ``(B,)``, float32.

        Args:
            probabilities: ``(B, C)``.
            features: ``(B, D)``.
        """
        return self.scaling(probabilities), self.distance(features)


class Suffix(nn.Module):
    """Maps rows at the cut to the outputs of the file: the trained stages, the head and the activation.

    Args:
        model: The trained classifier; its trained part is copied to the CPU.
        backbone: Its backbone, with merged adapters.
        prefix: Computes the rows.
        answers: Its calibrated answers; ``None`` to leave out all outputs but the probabilities.
    """

    def __init__(
        self, model: ImageClassifier, backbone: Backbone, prefix: FrozenPrefix, answers: Answers | None = None
    ) -> None:
        super().__init__()
        names = model.cut.trainable
        self.stages = StageChain(
            backbone.readout(names), *(copy.deepcopy(backbone.stages[name]).cpu().float() for name in names)
        )
        self.head = copy.deepcopy(model.head).cpu().float()
        self.calibrated = None if answers is None else CalibratedOutputs(model.task, answers)
        self.eval().requires_grad_(False)
        self._task = model.task
        if names:
            size = backbone.preprocessing.crop
            fold_batch_norm(self.stages, prefix(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The :data:`OUTPUTS` of rows, float32: probabilities ``(B, C)``, and distances ``(B,)``."""
        features = self.stages(rows)
        probabilities = self._task.probabilities(self.head(features))
        further = () if self.calibrated is None else self.calibrated(probabilities, features)
        return dict(zip(OUTPUTS[: 1 + len(further)], (probabilities, *further), strict=True))


class ExportedNetwork(nn.Module):
    """Maps pixels, uint8 ``(B, 3, S, S)``, to the outputs of the file, see :class:`Suffix`.

    It is a copy on the CPU, with merged adapters and folded BatchNorm. The prefix contains the normalization and the
    frozen stages; classifiers of several tasks on one backbone have equal ones.

    Args:
        model: The trained classifier; it is not changed.
        answers: Its calibrated answers; ``None`` to leave out all outputs but the probabilities.
    """

    def __init__(self, model: ImageClassifier, answers: Answers | None = None) -> None:
        super().__init__()
        backbone = merge_adapters(model.backbone)
        self.prefix = FrozenPrefix(backbone, model.cut, layout=torch.contiguous_format)
        self.suffix = Suffix(model, backbone, self.prefix, answers)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return OUTPUTS if self.suffix.calibrated is not None else OUTPUTS[:1]

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of images."""
        return cast(dict[str, torch.Tensor], self.suffix(self.prefix(pixels)))


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

    def forward(self, images: torch.Tensor) -> Any:
        """Preprocess and run images."""
        settings = self._preprocessing
        sides = images.shape[1:3]
        shorter = cast(int, torch.sym_min(*sides))  # a symbol while torch.export traces
        height, width = (settings.resize if settings.squash else settings.resize * side // shorter for side in sides)
        top, left = (_half_rounded_to_even(side - settings.crop) for side in (height, width))
        narrow = resample(images, width, left, settings.crop, settings.interpolation)
        turned = resample(narrow.permute(0, 3, 2, 1), height, top, settings.crop, settings.interpolation)
        return self.network(turned.transpose(2, 3))


def _half_rounded_to_even(margin: int) -> int:
    """``round(margin / 2)`` in integers, which ``torch.export`` can trace."""
    return (margin + margin // 2 % 2) // 2
