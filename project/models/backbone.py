"""Backbone: a pretrained network without its classifier, split into stages that can be frozen."""

from __future__ import annotations

import copy
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from project.errors import ConfigError
from project.models.adapters import Adapter, merge_updates
from project.models.cut import WHOLE, Cut
from project.models.fingerprint import fingerprint, fingerprint_tensors, named_tensors
from project.models.network_parts import Part, whole_tensors
from project.models.readout import FeatureKind, Readout, available_features, feature_dim, readout_of, run_stages
from project.preprocessing import Preprocessing

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: ``frozen``: keep the pretrained running statistics, and normalize with them; ``train``: normalize with the statistics
#: of the batch, and update the running ones.
BatchNormMode = Literal["frozen", "train"]


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


def stage_prefix(name: str) -> str:
    """Prefix of a stage's tensors in the state dict of a classifier: a module's name must not contain a dot."""
    return f"backbone.stages.{name.replace('.', '_')}."


class Stages(nn.ModuleDict):
    """Stages by name, in order. ``train()`` leaves the ``frozen`` ones in ``eval()`` mode.

    The stage ``blocks.0`` is the submodule ``blocks_0``: the name of a module must not contain a dot.

    Attributes:
        frozen: Names of the frozen stages.
        trains_batch_norm: Whether ``train()`` sets the mode of the BatchNorm modules of the other stages, too. If not,
            their running statistics normalize the batches and do not change.
    """

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__({name.replace(".", "_"): stage for name, stage in stages.items()})
        self.names = tuple(stages)
        self.frozen: tuple[str, ...] = ()
        self.trains_batch_norm = True

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(name.replace(".", "_"))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def keys(self) -> KeysView[str]:
        """Names of the stages."""
        return dict.fromkeys(self.names).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        """Names and stages."""
        return dict(zip(self.names, self.values(), strict=True)).items()

    def train(self, mode: bool = True) -> Stages:
        """Set the mode of the stages that are not frozen."""
        super().train(mode)
        for name in self.frozen:
            self[name].eval()
        self.freeze_batch_norm(self)
        return self

    def freeze_batch_norm(self, names: Iterable[str]) -> None:
        """Set the BatchNorm modules of some stages to ``eval()`` mode, unless they train."""
        for name in () if self.trains_batch_norm else names:
            for norm in self.batch_norms(name):
                norm.training = False  # eval() would include its children: timm's have a dropout

    def batch_norms(self, name: str) -> Iterator[nn.Module]:
        """The BatchNorm modules of a stage."""
        return (module for module in self[name].modules() if isinstance(module, BATCH_NORMS))


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
        adapter: Selects the parameters that are trained after the cut, see :meth:`adapt`; ``None`` for all.
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
        self.adapter: Adapter | None = None
        self.output_dim = self.feature_dim = output_dim
        self.features: FeatureKind = "last"
        self._readout: Readout = run_stages  # of all stages
        self.preprocessing = preprocessing
        self.origin = origin or Origin(None, "unknown")
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor
        everything = Cut(tuple(self.stages))
        self.sha256 = sha256 or self.fingerprint(everything)
        self.freeze(everything)

    def cut_at(self, trainable: str, setting: str = "model.trainable") -> Cut:
        """Create the cut before a stage, see :meth:`project.models.cut.Cut.at`."""
        return Cut.at(list(self.stages), trainable, self.name, setting)

    def freeze(self, cut: Cut) -> None:
        """Freeze the stages before the cut. Unfreeze the others, or only the parameters that the adapter trains."""
        self.cut = cut
        self.stages.frozen = cut.frozen
        for name, stage in self.stages.items():
            stage.requires_grad_(name in cut.trainable)
        for name in cut.trainable:
            for tensor in self.base_tensors(name, self.adapter).values():
                tensor.requires_grad_(False)
        self.train(self.training)

    def has_trainable_batch_norm(self, cut: Cut) -> bool:
        """Whether a trainable stage of a cut has BatchNorm modules."""
        return any(True for name in cut.trainable for _ in self.stages.batch_norms(name))

    def set_batch_norm(self, mode: BatchNormMode) -> None:
        """Set whether training changes the running statistics of BatchNorm modules in stages that are not frozen."""
        self.stages.trains_batch_norm = mode == "train"
        self.train(self.training)

    def adapt(self, adapter: Adapter, cut: Cut) -> Cut:
        """Train only some parameters of the stages after a cut. All other tensors, buffers too, stay bit-identical.

        Args:
            adapter: Selects or adds the parameters.
            cut: Its trainable stages are adapted.

        Returns:
            The new cut, before the first stage with a trained parameter.

        Raises:
            ConfigError: No parameter would be trained.
        """
        adapter.attach({name: self.stages[name] for name in cut.trainable})
        adapted = [name for name in cut.trainable if adapter.trained(self.stages[name])]
        if not adapted:
            raise ConfigError(
                f"model.adapter {adapter.description}: {', '.join(cut.trainable)} of {self.name} has no "
                "such parameters. Use another adapter, or train more stages (--model.trainable)."
            )
        self.adapter, self.stages.trains_batch_norm = adapter, False
        self.freeze(self.cut_at(adapted[0]))
        return self.cut

    def base_tensors(self, stage: str, adapter: Adapter | None) -> dict[str, torch.Tensor]:
        """Parameters and buffers of a trainable stage that an adapter does not train; none without an adapter."""
        if adapter is None:
            return {}
        trained = set(adapter.trained(self.stages[stage]))
        return {name: tensor for name, tensor in named_tensors(self.stages[stage]) if name not in trained}

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
        """How to run some stages: if they include the last one, their output is the features."""
        return self._readout if names and names[-1] == self.stages.names[-1] else run_stages

    def specialized(self, cut: Cut, adapter: Adapter | None = None) -> Backbone:
        """Create a backbone that shares the frozen stages and copies the trainable ones.

        Several classifiers can share one frozen network. Moving one of them to a device moves the shared stages.

        Args:
            cut: The cut of the new backbone.
            adapter: An adapter that :meth:`adapt` will attach. Tensors that it does not train are shared.

        Raises:
            ConfigError: This backbone has an adapter.
        """
        if self.adapter is not None:
            raise ConfigError(
                f"The backbone {self.name} is adapted already ({self.adapter.description}). "
                "Load another one, or pass merge_adapters(backbone)."
            )
        shared = {id(tensor): tensor for name in cut.trainable for tensor in self.base_tensors(name, adapter).values()}
        stages = {
            name: copy.deepcopy(stage, dict(shared)) if name in cut.trainable else stage
            for name, stage in self.stages.items()
        }
        backbone = Backbone(self.name, stages, self.output_dim, self.preprocessing, self.origin, self.sha256)
        backbone.freeze(cut)
        return backbone

    def compile_halves(self) -> None:
        """Compile the prefix and the suffix as one graph each; one graph per stage exceeds dynamo's cache limit."""
        self._prefix = torch.compile(self._prefix)  # type: ignore[method-assign]
        self._suffix = torch.compile(self._suffix)  # type: ignore[method-assign]

    def fingerprint(self, cut: Cut) -> str:
        """SHA-256 of the current parameters and buffers of the frozen stages."""
        if self._is_divided and not cut.trainable:
            return fingerprint_tensors(whole_tensors(self.stages.values()))
        return fingerprint((name, self.stages[name]) for name in cut.frozen)

    def recorded_stages(self, cut: Cut) -> list[str]:
        """Names of the frozen stages in the keys of stored features.

        All parts of a network together have one name, because earlier versions did not divide these networks: their
        features and fingerprints stay valid.
        """
        return [WHOLE] if self._is_divided and not cut.trainable else list(cut.frozen)

    @property
    def _is_divided(self) -> bool:
        """Whether the stages are parts of a network that earlier versions did not divide."""
        return all(isinstance(stage, Part) for stage in self.stages.values())

    def frozen_fingerprint(self, cut: Cut) -> str:
        """SHA-256 of all tensors that training must not change: frozen stages, and the base tensors of adapted ones."""
        if self.adapter is None:
            return self.fingerprint(cut)
        tensors = {name: dict(named_tensors(self.stages[name])) for name in cut.frozen}
        tensors |= {name: self.base_tensors(name, self.adapter) for name in cut.trainable}
        return fingerprint_tensors(
            (f"{name}.{key}", tensor) for name, stage in tensors.items() for key, tensor in stage.items()
        )

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
            Rows at the cut: features ``(B, D)``, maps ``(B, K, h, w)`` or tokens ``(B, N, K)``, without a gradient
            graph.
        """
        for name in cut.frozen:
            self.stages[name].eval()  # train() may have been called on the stage itself
        return self._prefix(images, cut.frozen)

    def refine(self, rows: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Run the trainable suffix: rows at the cut to features ``(B, D)``."""
        self.stages.freeze_batch_norm(cut.trainable)  # train() may have been called on the stage itself
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


def merge_adapters(backbone: Backbone) -> Backbone:
    """Copy a backbone, with its low-rank updates added to the weights, for export or faster inference.

    Outputs are equal up to rounding.

    Args:
        backbone: With or without an adapter; it is not changed.

    Returns:
        A frozen backbone of plain layers, on the same device. Its ``sha256`` is that of the merged weights.
    """
    stages = {name: merge_updates(stage) for name, stage in backbone.stages.items()}
    merged = Backbone(backbone.name, stages, backbone.output_dim, backbone.preprocessing, backbone.origin)
    merged.to(backbone.mean.device).set_features(backbone.features)
    return merged.eval()
