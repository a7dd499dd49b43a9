"""What a checkpoint keeps of a classifier, and how it comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.checkpoints.compatibility import FORMAT, let_flags_win, refuse_another, refuse_tensors, versions
from project.checkpoints.reader import hyper_parameters, read_checkpoint, refuse_malformed
from project.checkpoints.resume_checks import refuse_progress, refuse_states
from project.config.class_path import construct
from project.errors import CheckpointError, ProjectError, WeightsError
from project.models.backbone import Backbone, Origin
from project.runtime.lightning_internals import attached_trainer, loop_state

#: The arguments of a classifier that name a class, and what kind of class it has to be.
PARTS: dict[str, type] = {"head": nn.Module, "optimizer": Optimizer, "scheduler": LRScheduler}


class Kept(pl.LightningModule):
    """A module whose checkpoints hold what was trained, and say which backbone that belongs to.

    Attributes:
        backbone: The network, a part of which is frozen.
        origin: Where its weights came from.
    """

    backbone: Backbone
    origin: Origin

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; empty until the data or a checkpoint has named them."""
        return tuple(self.hparams["classes"] or ())

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: str | torch.device | None = None, **changes: Any
    ) -> Self:
        """Load a trained model, safely; Lightning's own would parse classes that a checkpoint's arguments name.

        Args:
            checkpoint_path: A checkpoint of a fit.
            map_location: Device that the model is moved to; by default the CPU.
            changes: Arguments other than the checkpoint's.

        Raises:
            CheckpointError: It is missing, damaged, unsafe, or does not fit its backbone.
            WeightsError: The backbone's weights are not to be had on this machine.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        arguments = hyper_parameters(checkpoint, checkpoint_path, cls, **PARTS)
        try:
            model = cls(**arguments | changes)
            model.on_load_checkpoint(checkpoint)
        except WeightsError as error:
            raise WeightsError("{path}: {reason}", path=checkpoint_path, reason=error) from error
        except ProjectError as error:
            raise CheckpointError("{path}: {reason}", path=checkpoint_path, reason=error) from error
        model.load_state_dict(checkpoint["state_dict"])
        return model if map_location is None else model.to(map_location)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler | None]:
        """The injected optimizer over some parameters, and the injected scheduler.

        Args:
            parameters: What trains.

        Raises:
            ConfigError: They do not take their arguments.
        """
        optimizer = construct("model.optimizer", self.hparams["optimizer"], Optimizer, parameters)
        given = self.hparams["scheduler"]
        return optimizer, None if given is None else construct("model.scheduler", given, LRScheduler, optimizer)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the model besides its tensors, in plain types."""
        return {
            "format": FORMAT,
            "classes": list(self.classes),
            "preprocessing": self.backbone.preprocessing.as_dict(),
            "backbone": {
                "name": self.backbone.name,
                "weights": self.origin.weights,
                "source": self.origin.source,
                "sha256": self.backbone.sha256,
            },
            "frozen": {"stages": list(self.backbone.frozen_names), "sha256": self.backbone.frozen_sha256},
            "versions": dict(versions()),
        }

    def _is_frozen(self, key: str) -> bool:
        return key.startswith(tuple(f"backbone.stages.{name}." for name in self.backbone.frozen_names))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained tensors alone: the frozen ones are known by name and SHA-256."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not self._is_frozen(k)}
        data: Any = getattr(self.trainer, "datamodule", None)
        split = vars(data.hold_out) if hasattr(data, "hold_out") else {}
        checkpoint["transfer"] = {**self.identity(), "split": dict(split)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, then complete it with the frozen tensors for Lightning's strict load.

        Raises:
            CheckpointError: Another backbone, preprocessing or classes; missing or unexpected tensors.
        """
        refuse_malformed(checkpoint)
        refuse_another(checkpoint["transfer"], self.identity())
        state = self.state_dict()
        refuse_tensors({k: v for k, v in state.items() if not self._is_frozen(k)}, checkpoint["state_dict"])
        trainer = attached_trainer(self)
        if trainer is not None:
            refuse_progress(checkpoint.get("loops"), loop_state(trainer), "loops")
        if trainer is not None and trainer.state.fn == "fit":
            let_flags_win(checkpoint, self.hparams)
            refuse_states(checkpoint, [p for p in self.parameters() if p.requires_grad], self.make_optimizer)
        checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}
