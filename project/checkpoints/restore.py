"""Save and restore an ImageClassifier: what was trained, and which backbone it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.checkpoints.compatibility import (
    FORMAT,
    name_groups,
    validate_identity,
    validate_tensors,
    versions,
)
from project.checkpoints.metadata import epochs_of
from project.checkpoints.reader import hyper_parameters, read_checkpoint, validate_form
from project.checkpoints.resume_checks import on_meta, validate_progress, validate_states
from project.checkpoints.resumed_optimizer import apply_changes
from project.config.class_path import ClassSpec
from project.errors import CheckpointError, ConfigError, ProjectError, WeightsError
from project.models.backbone import Backbone, BackboneFactory
from project.models.cut import Cut
from project.models.schedules import Interval, interval_of, with_length
from project.runtime.lightning_internals import attached_trainer, loop_state

#: The arguments of a classifier that name a class, and what kind of class it has to be.
PARTS: dict[str, type] = {"head": nn.Module, "optimizer": Optimizer, "scheduler": LRScheduler}

if TYPE_CHECKING:
    Module = pl.LightningModule
else:
    Module = object


def construct_optimizer(
    asked: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> tuple[Optimizer, LRScheduler | None]:
    """The optimizer and the scheduler that hyper-parameters ask for, over some parameter groups.

    Raises:
        ConfigError: They do not take their arguments.
    """
    spec = ClassSpec.from_dict(asked["optimizer"])
    own = [dict(group) for group in groups]  # an optimizer adds its settings to them
    if spec.name == "SparseAdam":
        raise ConfigError(
            "model.optimizer: SparseAdam takes sparse gradients alone, and there are none here. Use Adam."
        )
    if spec.name == "LBFGS":  # it takes one group alone
        own = [{"name": "all", "params": [each for group in groups for each in group["params"]]}]
    optimizer = spec.construct("model.optimizer", Optimizer, own)
    given = asked["scheduler"]
    if given is None:
        return optimizer, None
    return optimizer, ClassSpec.from_dict(given).construct("model.scheduler", LRScheduler, optimizer)


class CheckpointMixin(Module):
    """The part of a classifier that writes and reads checkpoints.

    Attributes:
        backbone: The network.
        cut: Which of its stages are frozen.
        frozen_sha256: SHA-256 of these as they were loaded.
    """

    backbone: Backbone
    cut: Cut
    head: nn.Module
    frozen_sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; empty until the data or a checkpoint has named them."""
        return tuple(self.hparams["classes"] or ())

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        backbones: BackboneFactory | None = None,
        **changes: Any,
    ) -> Self:
        """Load a trained model, safely; Lightning's own would parse classes that a checkpoint's arguments name.

        Args:
            checkpoint_path: A checkpoint of a fit.
            map_location: Device that the model is moved to; by default the CPU.
            backbones: Loads the backbone; models that share one share its frozen stages.
            changes: Arguments other than the checkpoint's.

        Raises:
            CheckpointError: It is missing, damaged, unsafe, or does not fit its backbone.
            WeightsError: The backbone's weights are not to be had on this machine.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        arguments = hyper_parameters(checkpoint, checkpoint_path, cls, **PARTS)
        try:
            arguments |= changes
            if backbones is not None:
                arguments["backbone"] = backbones(*(arguments[key] for key in ("backbone", "weights", "image_size")))
            model = cls(**arguments)
            model.on_load_checkpoint(checkpoint)
        except WeightsError as error:
            raise WeightsError("{path}: {reason}", path=checkpoint_path, reason=error) from error
        except ProjectError as error:
            raise CheckpointError("{path}: {reason}", path=checkpoint_path, reason=error) from error
        model.load_state_dict(checkpoint["state_dict"])
        return model if map_location is None else model.to(map_location)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, stage by stage: ``{"name": "layer4", "params": [...]}``; the head comes last."""
        parts = [(name, self.backbone.stages[name]) for name in self.cut.trainable] + [("head", self.head)]
        groups = [{"name": name, "params": [p for p in part.parameters() if p.requires_grad]} for name, part in parts]
        return [group for group in groups if group["params"]]

    def make_optimizer(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Optimizer, LRScheduler | None]:
        """The injected optimizer over some parameter groups, and the injected scheduler.

        Args:
            groups: As :meth:`parameter_groups` gives them.

        Raises:
            ConfigError: They do not take their arguments.
        """
        return construct_optimizer(self._with_length(self.hparams, self.schedule_length()), groups)

    def scheduler_interval(self) -> Interval:
        """How often the scheduler is stepped."""
        return interval_of(self.hparams["scheduler"], self.hparams.get("scheduler_interval"))

    def schedule_length(self) -> int | None:
        """Epochs or steps of the whole fit, whichever the scheduler counts; ``None`` where that is not known."""
        trainer = attached_trainer(self)
        if trainer is None or self.hparams["scheduler"] is None:
            return None
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        limited = trainer.max_steps > 0
        if not limited and (epochs is None or self.scheduler_interval() == "epoch"):
            return epochs
        steps = trainer.estimated_stepping_batches
        if self.scheduler_interval() == "step":
            return int(steps) if math.isfinite(steps) else None
        an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return min(filter(None, (epochs, math.ceil(trainer.max_steps / an_epoch))))

    @staticmethod
    def _with_length(asked: Mapping[str, Any], length: int | None) -> dict[str, Any]:
        """Hyper-parameters whose scheduler is as long as a fit."""
        scheduler = asked["scheduler"]
        if scheduler is not None:
            scheduler = with_length(scheduler, length, interval_of(scheduler, asked.get("scheduler_interval")))
        return {**asked, "scheduler": scheduler}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the model besides its tensors, in plain types."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "preprocessing": self.backbone.preprocessing.as_dict(),
            "backbone": {
                "name": self.backbone.name,
                "weights": self.backbone.origin.weights,
                "source": self.backbone.origin.source,
                "sha256": self.backbone.sha256,
            },
            "frozen": {"stages": list(self.cut.frozen), "sha256": self.frozen_sha256},
            "versions": dict(versions()),
        }

    def _trained(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state dict, what does not belong to a frozen stage: all that a fit may change, and a head as it is."""
        frozen = tuple(f"backbone.stages.{name}." for name in self.cut.frozen)
        return {name: value for name, value in state.items() if not name.startswith(frozen)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained tensors alone: the frozen ones are known by name and SHA-256."""
        checkpoint["state_dict"] = self._trained(checkpoint["state_dict"])
        data: Any = getattr(self.trainer, "datamodule", None)
        split = vars(data.hold_out) if hasattr(data, "hold_out") else {}
        schedule = {"length": self.schedule_length()}
        checkpoint["transfer"] = {**self.identity(), "split": dict(split), "schedule": schedule}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, then complete it with the frozen tensors for Lightning's strict load.

        Raises:
            CheckpointError: Another backbone, preprocessing or classes; missing or unexpected tensors.
        """
        validate_form(checkpoint)
        validate_identity(checkpoint["transfer"], self.identity())
        state = self.state_dict()
        validate_tensors(self._trained(state), checkpoint["state_dict"])
        trainer = attached_trainer(self)
        if trainer is not None:
            validate_progress(checkpoint.get("loops"), loop_state(trainer), "loops")
        if trainer is not None and trainer.state.fn == "fit":
            groups = on_meta(self.parameter_groups())
            name_groups(checkpoint, groups)
            length = checkpoint["transfer"].get("schedule", {}).get("length")
            apply_changes(
                checkpoint,
                # Earlier versions stepped every schedule once an epoch.
                self._with_length(
                    {"scheduler_interval": "epoch", **checkpoint["hyper_parameters"]},
                    length if type(length) is int else None,
                ),
                self._with_length(self.hparams, self.schedule_length()),
                lambda asked: construct_optimizer(asked, on_meta(groups)),
                {"epoch": epochs_of(checkpoint), "step": checkpoint["global_step"]},
            )
            validate_states(checkpoint, groups, self.make_optimizer)
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}
