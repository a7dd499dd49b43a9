"""The backbone: a pretrained network without its classifier, cut into stages, some or all of them frozen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from project.errors import ModelError, nearest
from project.models import weights as files
from project.models.fingerprint import fingerprint
from project.models.registry import Architecture, architecture
from project.models.stages import cut
from project.preprocessing import Preprocessing

RANDOM_SEED = 0  # random weights are the same ones every time, so that a checkpoint of kilobytes can come back to them


class Stages(nn.ModuleDict):
    """Stages by name, in order; those that are ``frozen`` stay in ``eval()``, whether it or what holds it is told."""

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__(stages)
        self.frozen: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> Stages:
        """Set the mode of those that are not frozen."""
        super().train(mode)
        for name in self.frozen:
            self[name].eval()
        return self


class Backbone(nn.Module):
    """Images ``(B, 3, H, W)`` to features ``(B, D)``, in two halves: a frozen prefix and a trainable suffix.

    The prefix is in ``eval()`` whatever anyone calls, has ``requires_grad=False``, and runs under ``no_grad``: its
    parameters and its BatchNorm buffers do not change by a bit.

    Args:
        name: Name of the architecture.
        stages: The stages in order; together they map normalised images to features ``(B, D)``.
        feature_dim: Width D of the features.
        preprocessing: What the weights ask of an image. Normalisation is done here, the rest where images are read.
        trainable: ``head`` (nothing of the backbone), a stage's name (from it to the end), or ``all``.

    Attributes:
        sha256: Fingerprint of the whole backbone as it was loaded.
        frozen_sha256: Fingerprint of its frozen stages as they were loaded.

    Raises:
        ModelError: There is no stage of that name.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, nn.Module],
        feature_dim: int,
        preprocessing: Preprocessing,
        trainable: str = "head",
    ) -> None:
        super().__init__()
        self.name = name
        self.stages = Stages(stages)
        self.feature_dim = feature_dim
        self.preprocessing = preprocessing
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.sha256 = fingerprint(self.stages.items())
        names = list(self.stages)
        choices = {"head": len(names), "all": 0} | {name: index for index, name in enumerate(names)}
        if trainable not in choices:
            raise ModelError(
                f"model.trainable: {self.name} has no stage {trainable!r}. {nearest(trainable, choices)}"
                f"It has {', '.join(names)}; or say head, or all."
            )
        self.trainable = trainable
        self.frozen_names = names[: choices[trainable]]
        self.trainable_names = names[choices[trainable] :]
        self.frozen_sha256 = self.fingerprint() if self.trainable_names else self.sha256
        self.freeze()

    def freeze(self) -> None:
        """Let gradients reach the trainable stages alone, and put the frozen ones in ``eval()``."""
        self.stages.frozen = tuple(self.frozen_names)
        for name, stage in self.stages.items():
            stage.requires_grad_(name in self.trainable_names)
        self.train(self.training)

    def compile_halves(self) -> None:
        """Run each half through ``torch.compile``, as one graph: stage by stage, they would use up its cache."""
        self._run_prefix = torch.compile(self._run_prefix)  # type: ignore[method-assign]
        self.refine = torch.compile(self.refine)  # type: ignore[method-assign]

    def fingerprint(self) -> str:
        """SHA-256 of the parameters and buffers of the frozen stages, as they are now."""
        return fingerprint((name, self.stages[name]) for name in self.frozen_names)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Bring images ``(B, 3, H, W)``, uint8 or float in [0, 1], to the mean and deviation the weights ask for."""
        values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return ((values - self.mean) / self.std).to(self.mean.dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Run the frozen prefix.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].

        Returns:
            Rows at the cut: features ``(B, D)`` or maps ``(B, K, h, w)``, with no gradient graph.
        """
        for name in self.frozen_names:
            self.stages[name].eval()  # somebody may have called train() on the stage itself, past the backbone
        return self._run_prefix(images)

    def _run_prefix(self, images: torch.Tensor) -> torch.Tensor:
        rows = self.normalize(images)
        for name in self.frozen_names:
            rows = self.stages[name](rows)
        return rows

    def refine(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the trainable suffix: rows at the cut to features ``(B, D)``."""
        for name in self.trainable_names:
            rows = self.stages[name](rows)
        return rows

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)``, uint8 or float in [0, 1], to features ``(B, D)``."""
        return self.refine(self.encode(images))


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights came from.

    Attributes:
        weights: What brings them back: as written, or the whole path of a file.
        source: The file that was read, for people.
        repository: Of the Hugging Face hub, where the file came from one.
    """

    weights: str | None
    source: str
    repository: str | None = None


def load_backbone(
    name: str,
    weights: str | None = "IMAGENET1K_V1",
    trainable: str = "head",
    image_size: int | None = None,
) -> tuple[Backbone, Origin]:
    """Build a backbone and load its weights, verified.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.
        weights: A name of the zoo, a file, ``pkg:NAME`` of an installed package, or ``None`` for random ones.
        trainable: ``head``, a stage's name, or ``all``.
        image_size: Side of the input in pixels; ``None`` is what the weights ask for.

    Raises:
        ModelError: Unknown backbone or stage, or an input size that it cannot take.
        WeightsError: Weights that are unknown, missing, altered, unsafe, or of another network.
    """
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size has to be at least 1, not {image_size}.")
    arch = architecture(name)
    state, origin = _read(weights, arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model, feature_dim = arch.build(state)
    preprocessing = arch.preprocessing(weights)
    fixed = arch.fixed_size(model)
    if fixed:
        if image_size not in (None, fixed):
            raise ModelError(f"model.image_size: {name} takes images of {fixed} px only, not {image_size}.")
        preprocessing = preprocessing.at(fixed)
    backbone = Backbone(name, cut(model), feature_dim, preprocessing.at(image_size), trainable)
    if image_size is not None:
        _try(backbone, image_size)
    return backbone, origin


def _try(backbone: Backbone, image_size: int) -> None:
    """Run one black image through: whether a network can take a size is told by no table."""
    mode = backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        why = str(error).split("\n")[0]
        raise ModelError(f"model.image_size: {backbone.name} cannot take images of {image_size} px: {why}") from error
    finally:
        backbone.train(mode)


def _read(weights: str | None, arch: Architecture) -> tuple[files.State | None, Origin]:
    if weights is None:
        warnings.warn(
            f"model.weights is null: {arch.name} has random weights, so its features are random too.", stacklevel=3
        )
        return None, Origin(None, f"random, seed {RANDOM_SEED}")
    if weights.startswith("pkg:"):
        path = files.from_package(weights.removeprefix("pkg:"))
        state = files.in_order(files.read_state(path), arch.reference(), weights)
        return state, Origin(weights, f"{weights}/{path.name}")
    if files.is_file_name(weights):
        path = files.from_file(weights)
        return files.read_state(path), Origin(str(path.resolve()), path.name)
    path = arch.fetch(weights)
    return files.read_state(path), Origin(weights, path.name, files.repository_of(path))
