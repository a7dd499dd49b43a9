"""Save and restore an ImageClassifier: its trained tensors and the identity of its backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.checkpoints.averages import exchange, restore_average, save_average
from project.checkpoints.compatibility import (
    FORMAT,
    match_parameter_groups,
    validate_identity,
    validate_tensors,
    versions,
)
from project.checkpoints.metadata import completed_epochs
from project.checkpoints.reader import hyper_parameters, read_checkpoint, validate_schema
from project.checkpoints.resume_checks import copy_groups, refuse_interpolated, validate_progress, validate_states
from project.checkpoints.resumed_optimizer import apply_changes
from project.checkpoints.resumed_schedule import saved_cut, validate_schedule
from project.checkpoints.undivided import divided_tensors, frozen_stages, require_divided
from project.checkpoints.warm_start import added_classes, require_extendable, starting_tensors
from project.errors import CheckpointError, ConfigError, ProjectError, WeightsError
from project.models.backbone import Backbone, stage_prefix
from project.models.cut import Cut
from project.models.heads import ResizableHead
from project.models.optimizers import construct_optimizer
from project.models.parameter_groups import stage_groups
from project.models.schedules import Interval, frequency_of, interval_of, with_length
from project.models.unfreezing import UnfreezingSchedule, entry_name
from project.models.weight_average import WeightAverage
from project.runtime.fit_length import fit_length
from project.runtime.lightning_internals import attached_trainer, loop_state

#: The classifier's arguments that name a class, each with the required base class.
CLASS_ARGUMENTS: dict[str, type] = {"head": nn.Module, "optimizer": Optimizer, "scheduler": LRScheduler}

if TYPE_CHECKING:
    Module = pl.LightningModule
else:
    Module = object


class CheckpointMixin(Module):
    """Checkpoint support of a classifier: saving, loading, and resuming with changed arguments.

    Attributes:
        backbone: The pretrained network.
        cut: Separates its frozen stages from the trainable ones.
        unfreezing: How the cut moves; ``None`` if it does not.
        head: Maps features to logits.
        frozen_sha256: SHA-256 of the frozen tensors as they were loaded.
        head_is_new: Whether the head has initial weights, at least for one class: neither trained nor loaded.
        average: Moving average of the trained weights in a fit; ``None`` for none.
    """

    backbone: Backbone
    cut: Cut
    unfreezing: UnfreezingSchedule | None
    head: nn.Module
    frozen_sha256: str
    head_is_new: bool
    average: WeightAverage | None
    #: Checkpoint whose weights a new fit starts from; ``None`` for none.
    start: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty until the data or a checkpoint provides them."""
        return tuple(self.hparams["classes"] or ())

    @property
    def last_cut(self) -> Cut:
        """The cut with all stages that a fit trains at its end."""
        return self.cut if self.unfreezing is None else self.unfreezing.cuts[-1]

    def move_cut(self, cut: Cut) -> None:
        """Freeze the stages before a cut, and train the others.

        Args:
            cut: Its frozen stages have the weights that were loaded.
        """
        self.cut = cut
        self.backbone.freeze(cut)
        self.frozen_sha256 = self.backbone.fingerprint(cut)
        if self.average is not None and self.average.updates:
            self.average.add(self.trained_tensors())

    @property
    def trains_head(self) -> bool:
        """Whether the head has parameters to train."""
        return any(parameter.requires_grad for parameter in self.head.parameters())

    @property
    def adapter_description(self) -> str:
        """Name and settings of the adapter, or "none"."""
        return "none" if self.backbone.adapter is None else self.backbone.adapter.description

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        backbones: Callable[..., Backbone] | None = None,
        **changes: Any,
    ) -> Self:
        """Load a trained model safely. Lightning's version would instantiate any class that a checkpoint names.

        Args:
            checkpoint_path: A checkpoint of a fit.
            map_location: Device to move the model to; by default the CPU.
            backbones: Loads the backbone; models with the same backbone share its frozen stages.
            changes: Constructor arguments that override the checkpoint's.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, unsafe, or does not fit its backbone.
            WeightsError: The backbone's weights are not available on this machine.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        arguments = hyper_parameters(checkpoint, checkpoint_path, cls, **CLASS_ARGUMENTS)
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
        """The trainable parameters, one group per stage, see :func:`~project.models.parameter_groups.stage_groups`.

        With a schedule, these are the parameters of all stages that the fit will train: schedulers and checkpoints
        do not support groups that are added later. An optimizer skips parameters without a gradient.
        """
        now, cut = self.cut, self.last_cut
        self.backbone.freeze(cut)  # sets requires_grad
        groups = stage_groups({**{name: self.backbone.stages[name] for name in cut.trainable}, "head": self.head})
        self.backbone.freeze(now)
        return groups

    def make_optimizer(self, groups: Sequence[Mapping[str, Any]]) -> tuple[Optimizer, LRScheduler | None]:
        """Construct the configured optimizer and scheduler.

        Args:
            groups: From :meth:`parameter_groups`.

        Raises:
            ConfigError: A class does not accept its arguments, or the optimizer cannot work here.
        """
        return construct_optimizer(with_length(self.hparams, self.schedule_length()), groups)

    def scheduler_interval(self) -> Interval:
        """Whether the scheduler is stepped once per epoch or once per optimizer step."""
        return interval_of(self.hparams)

    def schedule_length(self) -> int | None:
        """Number of the scheduler's steps in the whole fit; ``None`` if it is unknown.

        Raises:
            ConfigError: The scheduler would never be stepped.
        """
        trainer = attached_trainer(self)
        if trainer is None or self.hparams["scheduler"] is None:
            return None
        length, frequency = fit_length(trainer, self.scheduler_interval()), frequency_of(self.hparams)
        if length is None or frequency == 1:
            return length
        if length < frequency and trainer.max_epochs != 0 and not getattr(trainer, "fast_dev_run", False):
            raise ConfigError(
                f"model.scheduler_frequency is {frequency}, but the fit has {length} {self.scheduler_interval()}s, so "
                "the learning rate would never change. Decrease it."
            )
        return max(length // frequency, 1)

    def identity(self) -> dict[str, Any]:
        """Identity of the model, for a checkpoint: classes, preprocessing, backbone and versions, in plain types."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "preprocessing": self.backbone.preprocessing.as_dict(),
            "features": self.backbone.features,
            "backbone": {
                "name": self.backbone.name,
                "weights": self.backbone.origin.weights,
                "source": self.backbone.origin.source,
                "sha256": self.backbone.sha256,
            },
            "frozen": {"stages": list(self.cut.frozen), "sha256": self.frozen_sha256},
            "adapter": self.adapter_description,
            "versions": dict(versions()),
        }

    def is_fit_of(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether a fit with a checkpoint resumes the checkpoint's fit. Else it starts from the checkpoint's weights.

        Args:
            checkpoint: From :func:`project.checkpoints.reader.read_checkpoint`, with the classes of this model.
        """
        saved, has_schedule = checkpoint["transfer"], self.unfreezing is not None
        if has_schedule or saved.get("last_cut") is not None:
            return has_schedule and saved.get("last_cut") is not None
        return list(self.cut.frozen) == frozen_stages(checkpoint, self.backbone)

    def split(self) -> dict[str, Any]:
        """The settings that split the trainer's data; empty if it does not come from an ImageDataModule."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return dict(vars(data.hold_out)) if hasattr(data, "hold_out") else {}

    def _without_frozen(self, state: Mapping[str, Any]) -> dict[str, Any]:
        frozen = tuple(stage_prefix(name) for name in self.cut.frozen)
        adapter = self.backbone.adapter
        base = {
            stage_prefix(name) + key for name in self.cut.trainable for key in self.backbone.base_tensors(name, adapter)
        }
        return {name: value for name, value in state.items() if not name.startswith(frozen) and name not in base}

    def trained_tensors(self, detached: bool = True) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint's ``state_dict``: trainable stages, buffers included, or an adapter, and head.

        Args:
            detached: Return detached tensors; otherwise, return the parameters and buffers themselves.
        """
        stages = [(stage_prefix(name), self.backbone.stages[name]) for name in self.cut.trainable]
        tensors: dict[str, torch.Tensor] = {}
        for prefix, module in [*stages, ("head.", self.head)]:
            tensors |= module.state_dict(prefix=prefix, keep_vars=not detached)
        return self._without_frozen(tensors)

    def start_from(self, checkpoint: Mapping[str, Any], name: str | Path) -> str:
        """Load the weights of a checkpoint as the start of a new fit, which does not resume the checkpoint's fit.

        The model may have more classes than the checkpoint, in any order, or more trainable stages. Weights of other
        classes stay as initialized, and other stages stay pretrained.

        Args:
            checkpoint: From :func:`project.checkpoints.reader.read_checkpoint`.
            name: Its name, for the log.

        Returns:
            What comes from the checkpoint and what is new, for the log.

        Raises:
            CheckpointError: The backbone or the preprocessing differs, the model lacks a class of the checkpoint, the
                checkpoint has trained a stage that is now frozen, or its head is another one, is not trained, or
                cannot get more classes.
        """
        saved, tensors, state = checkpoint["transfer"], divided_tensors(checkpoint, self.backbone), self.state_dict()
        before, new = saved["classes"], added_classes(saved["classes"], self.classes)
        expected = {**self.identity(), "classes": before if new else list(self.classes)}
        if set(self.cut.trainable) <= set(saved["frozen"]["stages"]):  # the checkpoint has trained its head only
            expected["adapter"] = saved.get("adapter", "none")
        validate_identity(saved, expected)
        if not self.trains_head:
            raise CheckpointError(
                f"{type(self.head).__name__} is computed and not trained, so a fit cannot start from it. "
                "Start a new fit without --ckpt_path; stored features are reused."
            )
        fresh = self._without_frozen(state)
        if checkpoint["hyper_parameters"]["head"] == self.hparams["head"]:
            require_extendable(type(self.head).__name__, fresh, tensors, len(before), len(self.classes))
        frozen = [stage for stage in frozen_stages(checkpoint, self.backbone) if stage in self.cut.trainable]
        self.load_state_dict({**state, **starting_tensors(fresh, tensors, frozen, before, self.classes)})
        self.head_is_new = bool(new)
        names = f"{len(new)} new ({', '.join(new)})" if new else "the same"
        self.start, init = str(name), self.hparams["head_init"]
        text = f"Classes: {names}; the head starts with the weights of {len(before)} classes from {name}"
        if init in ("solved", "solved_1se") or (init == "auto" and new):
            text += ", unless it is solved"
        return f"{text}\nStages: {', '.join(frozen)} now trained, from the pretrained weights" if frozen else text

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen tensors, and add the model's identity with their SHA-256, and the averaged weights."""
        checkpoint["state_dict"] = self._without_frozen(checkpoint["state_dict"])
        weights = checkpoint.pop("weights", "raw")  # see BestCheckpoint
        if self.average is not None:
            save_average(checkpoint, self.average)
            if weights == "ema":
                exchange(checkpoint)
        schedule = {"length": self.schedule_length()}
        checkpoint["transfer"] = {
            **self.identity(),
            "split": self.split(),
            "schedule": schedule,
            "start": self.start,
            "weights": weights,
            "last_cut": None if self.unfreezing is None else entry_name(self.last_cut),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Validate a checkpoint, apply changed arguments, and add the frozen tensors for Lightning's strict load.

        Raises:
            CheckpointError: The backbone, preprocessing or classes differ, tensors are missing or unexpected, or the
                training state is damaged.
            ConfigError: A changed argument cannot take effect in a resumed fit.
        """
        validate_schema(checkpoint)
        validate_identity(checkpoint["transfer"], self.identity())
        start = checkpoint["transfer"].get("start")
        self.start = start if isinstance(start, str) else None
        if isinstance(self.head, ResizableHead):
            tensors = checkpoint["state_dict"].items()
            self.head.resize({name.removeprefix("head."): value for name, value in tensors if name.startswith("head.")})
        trainer = attached_trainer(self)
        resumes = trainer is not None and trainer.state.fn == "fit"
        if resumes:
            require_divided(checkpoint, self.backbone)
            refuse_interpolated(checkpoint["transfer"])
        if resumes and checkpoint["transfer"].get("weights") == "ema":
            exchange(checkpoint)  # training continues from the raw weights
        if self.unfreezing is not None:
            self.move_cut(saved_cut(checkpoint, self.unfreezing))
            if resumes:
                validate_schedule(checkpoint, self.unfreezing, self.cut)
        checkpoint["state_dict"] = divided_tensors(checkpoint, self.backbone)
        state = self.state_dict()
        validate_tensors(self._without_frozen(state), checkpoint["state_dict"])
        if resumes and self.average is not None:
            restore_average(checkpoint, self._without_frozen(state), self.average)
        if trainer is not None:
            validate_progress(checkpoint.get("loops"), loop_state(trainer), "loops")
        if resumes and self.parameter_groups():
            groups = copy_groups(self.parameter_groups())
            optimizer, _ = construct_optimizer({**self.hparams, "scheduler": None}, copy_groups(groups))
            match_parameter_groups(checkpoint, groups, [group["name"] for group in optimizer.param_groups])
            length = checkpoint["transfer"].get("schedule", {}).get("length")
            apply_changes(
                checkpoint,
                # Earlier versions stepped every scheduler once an epoch.
                with_length(
                    {"scheduler_interval": "epoch", **checkpoint["hyper_parameters"]},
                    length if type(length) is int else None,
                ),
                with_length(self.hparams, self.schedule_length()),
                lambda hparams: construct_optimizer(hparams, copy_groups(groups)),
                {"epoch": completed_epochs(checkpoint), "step": checkpoint["global_step"]},
            )
            validate_states(checkpoint, groups, self.make_optimizer)
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}
