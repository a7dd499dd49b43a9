"""The backbone: a pretrained network without its classifier, cut into stages, some or all of them frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from project.errors import ModelError
from project.models import weights as files
from project.models.cut import Cut
from project.models.fingerprint import fingerprint
from project.models.registry import Architecture, architecture
from project.models.stages import split_into_stages
from project.preprocessing import Preprocessing

RANDOM_SEED = 0  # random weights are the same ones every time, so that a checkpoint of kilobytes can come back to them


@dataclass(frozen=True)
class Origin:
    """Where a backbone's weights came from.

    Attributes:
        weights: What brings them back: as written, or the whole path of a file.
        source: The file that was read, for people.
        repository: Of the Hugging Face hub, where the file came from one.
        image_size: Side of the input in pixels that was asked for; ``None`` for what the weights ask for.
    """

    weights: str | None
    source: str
    repository: str | None = None
    image_size: int | None = None


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
    """A pretrained network without its classifier: a chain of stages, images ``(B, 3, H, W)`` to features ``(B, D)``.

    A :class:`~project.models.cut.Cut` divides it into two halves, a frozen prefix and a trainable suffix. Frozen stages
    are in ``eval()`` whatever anyone calls, have ``requires_grad=False`` and run under ``no_grad``: their parameters
    and BatchNorm buffers do not change by a bit. A new backbone is frozen whole.

    Args:
        name: Name of the architecture.
        stages: The stages in order; together they map normalised images to features ``(B, D)``.
        feature_dim: Width D of the features.
        preprocessing: What the weights ask of an image. Normalisation is done here, the rest where images are read.
        origin: Where the weights came from; without it, no checkpoint can bring them back.
        sha256: Fingerprint of the stages, if it is known.

    Attributes:
        sha256: Fingerprint of all stages as they were loaded.
        cut: Where it was last frozen; :meth:`forward` is the two halves of it.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, nn.Module],
        feature_dim: int,
        preprocessing: Preprocessing,
        origin: Origin | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.stages = Stages(stages)
        self.feature_dim = feature_dim
        self.preprocessing = preprocessing
        self.origin = origin or Origin(None, "unknown")
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.sha256 = sha256 or fingerprint(self.stages.items())
        self.freeze(Cut(tuple(self.stages)))

    def cut_at(self, trainable: str) -> Cut:
        """The cut before a stage: see :meth:`project.models.cut.Cut.at`."""
        return Cut.at(list(self.stages), trainable, self.name)

    def freeze(self, cut: Cut) -> None:
        """Let gradients reach the trainable stages alone, and put the frozen ones in ``eval()``."""
        self.cut = cut
        self.stages.frozen = cut.frozen
        for name, stage in self.stages.items():
            stage.requires_grad_(name in cut.trainable)
        self.train(self.training)

    def specialized(self, cut: Cut) -> Backbone:
        """A backbone with the same frozen stages, not a copy of them, and copies of the stages that train.

        So any number of classifiers share one frozen network, and none trains another's stages. Moving one of them to
        a device moves the shared stages.
        """
        stages = {name: copy.deepcopy(stage) if name in cut.trainable else stage for name, stage in self.stages.items()}
        own = Backbone(self.name, stages, self.feature_dim, self.preprocessing, self.origin, self.sha256)
        own.freeze(cut)
        return own

    def compile_halves(self) -> None:
        """Run each half through ``torch.compile``, as one graph: stage by stage, they would use up its cache."""
        self._prefix = torch.compile(self._prefix)  # type: ignore[method-assign]
        self._suffix = torch.compile(self._suffix)  # type: ignore[method-assign]

    def fingerprint(self, cut: Cut) -> str:
        """SHA-256 of the parameters and buffers of the frozen stages, as they are now."""
        return fingerprint((name, self.stages[name]) for name in cut.frozen)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Bring images ``(B, 3, H, W)``, uint8 or float in [0, 1], to the mean and deviation the weights ask for."""
        values = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return ((values - self.mean) / self.std).to(self.mean.dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Run the frozen prefix.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].
            cut: Where the prefix ends.

        Returns:
            Rows at the cut: features ``(B, D)`` or maps ``(B, K, h, w)``, with no gradient graph.
        """
        for name in cut.frozen:
            self.stages[name].eval()  # somebody may have called train() on the stage itself, past the backbone
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
        for name in names:
            rows = self.stages[name](rows)
        return rows


def load_backbone(name: str, weights: str | None = "IMAGENET1K_V1", image_size: int | None = None) -> Backbone:
    """Build a backbone and load its weights, verified.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.
        weights: A name of the zoo, a file, ``pkg:NAME`` of an installed package, or ``None`` for random ones.
        image_size: Side of the input in pixels; ``None`` is what the weights ask for.

    Raises:
        ModelError: Unknown backbone, or an input size that it cannot take.
        WeightsError: Weights that are unknown, missing, altered, unsafe, or of another network.
    """
    if image_size is not None and image_size < 1:
        raise ModelError(f"model.image_size has to be at least 1, not {image_size}.")
    arch = architecture(name)
    state, origin = _read(weights, arch)
    origin = replace(origin, image_size=image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model, feature_dim = arch.build(state)
    preprocessing = arch.preprocessing(weights)
    fixed = arch.fixed_size(model)
    if fixed:
        if image_size not in (None, fixed):
            raise ModelError(f"model.image_size: {name} takes images of {fixed} px only, not {image_size}.")
        preprocessing = preprocessing.at(fixed)
    backbone = Backbone(name, split_into_stages(model), feature_dim, preprocessing.at(image_size), origin)
    if image_size is not None:
        _try(backbone, image_size)
    return backbone


class BackboneFactory:
    """Loads each backbone once, however many classifiers are built on it."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str | None, int | None], Backbone] = {}

    def __call__(self, name: str, weights: str | None, image_size: int | None) -> Backbone:
        """The backbone that :func:`load_backbone` gives for the same arguments."""
        key = name, weights, image_size
        if key not in self._loaded:
            self._loaded[key] = load_backbone(*key)
        return self._loaded[key]


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
