"""Staged unfreezing: the cut of a fit moves at the start of an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from project.classifier import ImageClassifier
from project.errors import ConfigError, damaged_checkpoint
from project.models.cut import Cut
from project.models.unfreezing import UnfreezingSchedule, WarmUp, entry_name, format_epochs
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.fit_length import steps_per_epoch
from project.runtime.logger_adapters import log_text

KEY = "unfreezing"


class StagedUnfreezing(pl.Callback):
    """Follows ``schedule`` of :class:`~project.classifier.ImageClassifier`; does nothing without one.

    Lightning's BackboneFinetuning adds parameter groups, which schedulers and resumed fits do not support. Here the
    optimizer has all groups from the first step, and a stage joins by requiring gradients. This callback must precede
    those that depend on the cut.
    """

    def __init__(self) -> None:
        self._best, self._waited = math.inf, 0  # lowest val/loss, and validations since then or since the cut moved
        self._counted = -1  # optimizer steps before the last validation, which a resumed fit may repeat

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        schedule = _schedule(pl_module)
        if stage != "fit" or schedule is None:
            return
        assert isinstance(pl_module, ImageClassifier)
        self._best, self._waited, self._counted = math.inf, 0, -1
        pl_module.follows_schedule, pl_module.warm_ups = True, {}
        if not getattr(trainer, "fast_dev_run", False):
            schedule.validate_length(trainer.max_epochs)
        if schedule.epochs is None and trainer.limit_val_batches == 0:
            raise ConfigError(
                "model.schedule: a list of stages needs validations, but trainer.limit_val_batches is 0. Name epochs, "
                "as in {0: head, 3: layer4}, or remove it."
            )
        if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
            raise ConfigError(
                f"model.schedule does not support {type(trainer.strategy).__name__}. Use --trainer.strategy ddp."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedule = _schedule(pl_module)
        if schedule is not None:
            assert isinstance(pl_module, ImageClassifier)
            if trainer.max_steps > 0 and not getattr(trainer, "fast_dev_run", False):
                epochs = math.ceil(trainer.max_steps / steps_per_epoch(trainer))
                schedule.validate_length(epochs, "max_steps")
            if math.isinf(steps_per_epoch(trainer)) and pl_module.hparams["schedule_warmup"]:
                raise ConfigError(
                    "model.schedule_warmup is a number of epochs, but the length of an epoch is unknown. Set it to 0, "
                    "or set trainer.limit_train_batches to a number."
                )
            print_rank_zero(f"Schedule: {schedule}")
            log_text(trainer, "schedule", str(schedule))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        schedule = _schedule(pl_module)
        if schedule is None:
            return
        assert isinstance(pl_module, ImageClassifier)
        cut = schedule.cut_in(trainer.current_epoch)
        if cut is None:
            cut = pl_module.cut if self._waited < (schedule.patience or 0) else schedule.after(pl_module.cut)
        if len(cut.frozen) < len(pl_module.cut.frozen):  # a second fit of a model continues with its stages
            self._move(trainer, pl_module, cut)
        values = {"stage/trainable_stages": float(len(pl_module.cut.trainable))}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=lightning_internals.logging_step(trainer))

    def _move(self, trainer: pl.Trainer, module: ImageClassifier, cut: Cut) -> None:
        module.check_frozen(f"before {entry_name(cut)} is trained")
        added = [name for name in cut.trainable if name in module.cut.frozen]
        module.move_cut(cut)
        lightning_internals.renew_ddp(trainer)
        warm_up = WarmUp.of_epochs(module.hparams["schedule_warmup"], trainer.global_step, steps_per_epoch(trainer))
        module.warm_ups.update(dict.fromkeys(added, warm_up))
        self._waited = 0
        ramp = f", with a warm-up of {warm_up.steps} step{'' if warm_up.steps == 1 else 's'}" if warm_up.steps else ""
        print_rank_zero(f"Schedule: {', '.join(added)} now trained, after {format_epochs(trainer.current_epoch)}{ramp}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == self._counted:
            return
        loss = trainer.callback_metrics.get("val/loss")
        if _schedule(pl_module) is not None and loss is not None:
            self._counted = trainer.global_step
            self._waited = 0 if float(loss) < self._best else self._waited + 1
            self._best = min(self._best, float(loss))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _schedule(pl_module) is not None:
            assert isinstance(pl_module, ImageClassifier)
            warm_ups = {name: list(warm_up) for name, warm_up in pl_module.warm_ups.items()}
            state = {"best": self._best, "waited": self._waited, "counted": self._counted}
            checkpoint[KEY] = {**state, "warm_ups": warm_ups}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _schedule(pl_module) is None or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ImageClassifier)
        state = _validated(checkpoint.get(KEY))
        self._best, self._waited, self._counted = state["best"], state["waited"], state["counted"]
        pl_module.warm_ups = {name: WarmUp(*values) for name, values in state["warm_ups"].items()}


def _schedule(module: pl.LightningModule) -> UnfreezingSchedule | None:
    return module.unfreezing if isinstance(module, ImageClassifier) else None


def _validated(state: Any) -> Mapping[str, Any]:
    """Check the types of the state in a checkpoint.

    Raises:
        CheckpointError: The state is missing or invalid.
    """
    types = {"best": float, "waited": int, "counted": int, "warm_ups": dict}
    is_valid = isinstance(state, dict) and all(type(state.get(name)) is kind for name, kind in types.items())
    warm_ups = [*state["warm_ups"].values()] if is_valid else []
    if not is_valid or any(not isinstance(item, list) or [*map(type, item)] != [int, int] for item in warm_ups):
        raise damaged_checkpoint("The checkpoint is damaged: its state of model.schedule is missing or invalid.")
    return dict(state)
