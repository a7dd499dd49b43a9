"""Backbone: a pretrained network without its classifier, split into stages that can be frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from project.errors import ModelError
from project.models import weights as weight_files
from project.models.cut import Cut
from project.models.fingerprint import fingerprint
from project.models.readout import FeatureKind, Readout, available_features, feature_dim, readout_of, run_stages
from project.models.registry import Architecture, architecture
from project.models.stages import split_into_stages
from project.preprocessing import Preprocessing

RANDOM_SEED = 0  # fixed, because checkpoints do not contain frozen weights, random ones included


@dataclass(frozen=True)
class Origin:
    """Origin of a backbone's weights.

    Attributes:
        weights: Argument that loads the same weights again; the absolute path of a file.
        source: Name of the weight file, for display.
        repository: Hugging Face repository of the file, if any.
        image_size: Requested image size in pixels; ``None`` for that of the weights.
    """

    weights: str | None
    source: str
    repository: str | None = None
    image_size: int | None = None


class Stages(nn.ModuleDict):
    """Stages by name, in order. ``train()`` leaves the ``frozen`` ones in ``eval()`` mode."""

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__(stages)
        self.frozen: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Stages:
        """Set the mode of the stages that are not frozen."""
        super().train(mode)
        for name in self.frozen:
            self[name].eval()
        return self


class Backbone(nn.Module):
    """Pretrained network without its classifier: images ``(B, 3, H, W)`` to features ``(B, D)``.

    A :class:`~project.models.cut.Cut` divides it into a frozen prefix and a trainable suffix. Frozen stages stay in
    ``eval()`` mode, have ``requires_grad=False`` and run under ``no_grad``, so their parameters and BatchNorm buffers
    are bit-identical after training. All stages of a new backbone are frozen.

    Args:
        name: Name of the architecture.
        stages: The stages in order; together they map normalized images to features ``(B, D)``.
        output_dim: Width of the last stage's output.
        preprocessing: Preprocessing that the weights require. The backbone normalizes; the data pipeline does the rest.
        origin: Origin of the weights; required to restore the backbone from a checkpoint.
        sha256: Fingerprint of all stages, if known.

    Attributes:
        sha256: Fingerprint of all stages as loaded.
        cut: The current cut.
        features: Which outputs are the features, see :meth:`set_features`.
        feature_dim: Width D of the features.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, nn.Module],
        output_dim: int,
        preprocessing: Preprocessing,
        origin: Origin | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.stages = Stages(stages)
        self.output_dim = self.feature_dim = output_dim
        self.features: FeatureKind = "last"
        self._readout: Readout = run_stages  # of all stages
        self.preprocessing = preprocessing
        self.origin = origin or Origin(None, "unknown")
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.sha256 = sha256 or fingerprint(self.stages.items())
        self.freeze(Cut(tuple(self.stages)))

    def cut_at(self, trainable: str, setting: str = "model.trainable") -> Cut:
        """Create the cut before a stage, see :meth:`project.models.cut.Cut.at`."""
        return Cut.at(list(self.stages), trainable, self.name, setting)

    def freeze(self, cut: Cut) -> None:
        """Freeze the stages before the cut and unfreeze the others."""
        self.cut = cut
        self.stages.frozen = cut.frozen
        for name, stage in self.stages.items():
            stage.requires_grad_(name in cut.trainable)
        self.train(self.training)

    def set_features(self, features: FeatureKind) -> None:
        """Set which outputs are the features.

        Args:
            features: See :func:`project.models.readout.readout_of`.

        Raises:
            ModelError: The network does not provide them.
        """
        if features != self.features:
            self.features, self._readout = features, readout_of(features, self.stages, self.name)
            stages, training = [*self.stages.values()], self.training
            self.eval()
            self.feature_dim = feature_dim(self._readout, stages, self.mean, self.preprocessing.crop)
            self.train(training)

    @property
    def available_features(self) -> list[FeatureKind]:
        """The kinds that :meth:`set_features` accepts."""
        return available_features(self.stages)

    def readout(self, names: Sequence[str]) -> Readout:
        """How to run some stages: all of them give the features, others the output of the last one."""
        return self._readout if len(names) == len(self.stages) else run_stages

    def specialized(self, cut: Cut) -> Backbone:
        """Create a backbone that shares the frozen stages and copies the trainable ones.

        Several classifiers can share one frozen network. Moving one of them to a device moves the shared stages.
        """
        stages = {name: copy.deepcopy(stage) if name in cut.trainable else stage for name, stage in self.stages.items()}
        backbone = Backbone(self.name, stages, self.output_dim, self.preprocessing, self.origin, self.sha256)
        backbone.freeze(cut)
        return backbone

    def compile_halves(self) -> None:
        """Compile the prefix and the suffix as one graph each; one graph per stage exceeds dynamo's cache limit."""
        self._prefix = torch.compile(self._prefix)  # type: ignore[method-assign]
        self._suffix = torch.compile(self._suffix)  # type: ignore[method-assign]

    def fingerprint(self, cut: Cut) -> str:
        """SHA-256 of the current parameters and buffers of the frozen stages."""
        return fingerprint((name, self.stages[name]) for name in cut.frozen)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images ``(B, 3, H, W)``, uint8 or float in [0, 1], with the mean and std of the weights."""
        values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return ((values - self.mean) / self.std).to(self.mean.dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Run the frozen prefix.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].
            cut: End of the prefix.

        Returns:
            Rows at the cut: features ``(B, D)`` or maps ``(B, K, h, w)``, without a gradient graph.
        """
        for name in cut.frozen:
            self.stages[name].eval()  # train() may have been called on the stage itself
        return self._prefix(images, cut.frozen)

    def refine(self, rows: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Run the trainable suffix: rows at the cut to features ``(B, D)``."""
        return self._suffix(rows, cut.trainable)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)``, uint8 or float in [0, 1], to features ``(B, D)``."""
        return self.refine(self.encode(images, self.cut), self.cut)

    def _prefix(self, images: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        return self._run(self.normalize(images), names)

    def _suffix(self, rows: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        return self._run(rows, names)

    def _run(self, rows: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        return self.readout(names)([self.stages[name] for name in names], rows)


def load_backbone(name: str, weights: str | None = "IMAGENET1K_V1", image_size: int | None = None) -> Backbone:
    """Build a backbone and load its weights.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.
        weights: A name of the zoo, a file, ``pkg:NAME`` of an installed package, or ``None`` for random weights.
        image_size: Image size in pixels; ``None`` for that of the weights.

    Raises:
        ModelError: Unknown backbone, or unsupported image size.
        WeightsError: The weights are unknown, missing, modified, unsafe, or of another network.
    """
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size must be at least 1, not {image_size}.")
    arch = architecture(name)
    state, origin = _read(weights, arch)
    origin = replace(origin, image_size=image_size)
    with torch.random.fork_rng(devices=[]), SkipRandomInit() if state is not None else nullcontext():
        torch.manual_seed(RANDOM_SEED)
        model, output_dim = arch.build(state)
    preprocessing = arch.preprocessing(weights)
    fixed_size = arch.fixed_size(model)
    if fixed_size:
        if image_size not in (None, fixed_size):
            raise ModelError(f"model.image_size: {name} supports only images of {fixed_size} px, not {image_size}.")
        preprocessing = preprocessing.with_image_size(fixed_size)
    preprocessing = preprocessing.with_image_size(image_size)
    backbone = Backbone(name, split_into_stages(model), output_dim, preprocessing, origin)
    if image_size is not None:
        _validate_image_size(backbone, image_size)
    return backbone


class SkipRandomInit(TorchFunctionMode):
    """Context in which random initialization has no effect, for networks whose weights are loaded afterwards."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor of a random initialization unchanged."""
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _validate_image_size(backbone: Backbone, image_size: int) -> None:
    """Run one black image, because no table says which sizes a network supports."""
    mode = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(
            f"model.image_size: {backbone.name} does not support images of {image_size} px ({reason}). Change the size."
        ) from error
    finally:
        backbone.train(mode)


def _read(weights: str | None, arch: Architecture) -> tuple[weight_files.State | None, Origin]:
    if weights is None:
        warnings.warn(
            f"model.weights is null: {arch.name} has random weights, so its features are random too.", stacklevel=3
        )
        return None, Origin(None, f"random, seed {RANDOM_SEED}")
    if weights.startswith("pkg:"):
        path = weight_files.from_package(weights.removeprefix("pkg:"))
        state = weight_files.in_order(weight_files.read_state(path), arch.reference(), weights)
        return state, Origin(weights, f"{weights}/{path.name}")
    if weight_files.is_file_name(weights):
        path = weight_files.from_file(weights)
        return weight_files.read_state(path), Origin(str(path.resolve()), path.name)
    path = arch.fetch(weights)
    return weight_files.read_state(path), Origin(weights, path.name, weight_files.repository_of(path))
