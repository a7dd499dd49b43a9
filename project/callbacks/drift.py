"""Drift: how similar the features of trained stages still are to the pretrained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from project.classifier import ImageClassifier
from project.evaluation.cka import linear_cka
from project.evaluation.step_outputs import StepOutput
from project.evaluation.validation_data import validated_images, validation_module
from project.features.row_loader import RowBatch
from project.models.cut import Cut
from project.models.pretrained import pretrained_stages
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import run_seed

METRIC = "drift/cka"
MAX_IMAGES = 256  # validation images of the sample


class Drift(pl.Callback):
    """Logs ``drift/cka`` after each validation of a fit that trains stages of the backbone.

    It is the linear CKA between the features of the validation and those of the pretrained network, on a fixed sample
    of the validation images: 1 if the features are unchanged. See :func:`~project.evaluation.cka.linear_cka`.

    The current features are those of the validation itself. The pretrained features are computed in the first
    validation, from the rows or images of its batches; with ``schedule``, again after each move of the cut, so that a
    resumed fit compares with the same values.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._pretrained: dict[str, nn.Module] = {}  # until the pretrained features of the last cut are known
        self._reference: torch.Tensor | None = None
        self._reference_cut: Cut | None = None
        self._sample = torch.zeros(0, dtype=torch.bool)
        self._is_active = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reset()
        if stage != "fit" or not trainer.enable_validation or not isinstance(pl_module, ImageClassifier):
            return
        if not pl_module.last_cut.trainable:
            return
        # Before Lightning restores a checkpoint, so that the pretrained weights are usually still in place.
        stages = pretrained_stages(pl_module.backbone, pl_module.last_cut.trainable)
        if stages is None:
            print_rank_zero(
                f"Drift: not measured, because the pretrained weights of {pl_module.backbone.name} cannot be loaded"
            )
            return
        self._pretrained, self._is_active = stages, True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_active and validation_module(trainer) is None:
            print_rank_zero("Drift: not measured, because the validation images do not come from an ImageDataModule")
            self._reset()
        for stage in self._pretrained.values():
            stage.to(trainer.strategy.root_device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and isinstance(pl_module, ImageClassifier):
            self.start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not trainer.sanity_checking and isinstance(pl_module, ImageClassifier):
            self.update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and isinstance(pl_module, ImageClassifier):
            value = self.compute(pl_module)
            if value is not None:
                pl_module.log(METRIC, value)

    def start(self, trainer: pl.Trainer, module: ImageClassifier) -> None:
        """Start a pass over the validation images.

        Args:
            trainer: The fit's trainer.
            module: The model.
        """
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._count = 0  # images of this rank so far
        self._indices: list[torch.Tensor] = []
        self._features: list[torch.Tensor] = []
        self._references: list[torch.Tensor] = []
        if self._is_active and not len(self._sample):
            self._sample = _sample(trainer)
        if self._reference_cut != module.cut:
            self._reference, self._reference_cut = None, module.cut

    @torch.no_grad()
    def update(self, trainer: pl.Trainer, module: ImageClassifier, outputs: StepOutput, batch: Any) -> None:
        """Add a batch of the pass.

        Args:
            trainer: The fit's trainer.
            module: The model.
            outputs: Result of the validation step.
            batch: Its input.
        """
        if not self._is_active:
            return
        # A rank validates images rank, rank + world_size, ... of the split; padding comes last.
        count = len(outputs.features)
        indices = torch.arange(self._count, self._count + count) * self._world_size + self._rank
        self._count += count
        chosen = self._sample[indices].nonzero().squeeze(1)
        if not len(chosen):
            return
        places = chosen.to(outputs.features.device)
        self._indices.append(indices[chosen])
        self._features.append(outputs.features[places].float().cpu())
        if self._reference is None:
            with trainer.precision_plugin.val_step_context():
                rows = batch[0][places]
                rows = rows.to(module.backbone.mean.dtype) if isinstance(batch, RowBatch) else module.encode(rows)
                stages = [self._pretrained[name] for name in module.cut.trainable]
                readout = module.backbone.readout(module.cut.trainable)
                self._references.append(readout(stages, rows).float().cpu())

    def compute(self, module: ImageClassifier) -> float | None:
        """The similarity of the pass; ``None`` if it is not measured. Collective: all ranks must call it.

        Args:
            module: The model.
        """
        if not self._is_active:
            return None
        parts = ProcessGroup().gather((self._indices, self._features, self._references))
        order = _concatenate([indices for indices, _, _ in parts]).argsort()
        if self._reference is None:
            self._reference = _concatenate([references for _, _, references in parts])[order]
            if module.cut == module.last_cut:
                self._pretrained = {}
        value = linear_cka(_concatenate([features for _, features, _ in parts])[order], self._reference)
        return value if math.isfinite(value) else None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._reset()


def _concatenate(per_rank: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([tensor for tensors in per_rank for tensor in tensors])


def _sample(trainer: pl.Trainer) -> torch.Tensor:
    """Whether each validated image of the split is in the sample, bool ``(N,)``. It depends only on the seed and N."""
    data = validation_module(trainer)
    assert data is not None  # see on_fit_start
    count = validated_images(trainer, data)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(run_seed()))[:MAX_IMAGES]] = True
    return chosen
