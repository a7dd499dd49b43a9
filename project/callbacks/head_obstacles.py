"""Why the head of a fit cannot be computed before training, and what it then refuses."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import nn

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.features.provider import row_memory_budget
from project.models.head_solver import COPIES, FOLDS
from project.models.heads import FittedHead
from project.models.lbfgs import HISTORY
from project.runtime import lightning_internals
from project.runtime.distributed import ProcessGroup


class Obstacle(NamedTuple):
    """Why a head cannot be computed, and how to fix it.

    Attributes:
        reason: A clause.
        fix: What to do, without the period; empty for what is never refused.
    """

    reason: str
    fix: str = ""


def refuse(trainer: pl.Trainer, module: ImageClassifier, obstacle: Obstacle) -> None:
    """Refuse a fit whose head has to be computed, but cannot be.

    Raises:
        ConfigError: The head cannot be used as it is, or ``head_init`` requires that it is computed.
    """
    name, init = type(module.head).__name__, module.hparams["head_init"]
    if not module.trains_head and module.head_is_new:
        raise ConfigError(
            f"model.head: {name} has to be computed from the training images, but {obstacle.reason}.\n{obstacle.fix}."
        )
    if init != "auto" and not getattr(trainer, "fast_dev_run", False):
        raise ConfigError(
            f"model.head_init {init}: the head cannot be computed, because {obstacle.reason}.\n{obstacle.fix}, or use "
            "--model.head_init auto."
        )


def find_obstacle(trainer: pl.Trainer, module: ImageClassifier, data: Any) -> Obstacle | None:
    """Why the head cannot be computed; ``None`` if it can."""
    name, fits_itself = type(module.head).__name__, isinstance(module.head, FittedHead)
    if not isinstance(module.head, nn.Linear) and not fits_itself:
        return Obstacle(
            f"{name} is not linear{'' if module.trains_head else ' and has no method fit'}",
            "Use LinearHead, or a head with a method fit",
        )
    if fits_itself and module.hparams["head_init"] == "solved_1se":
        return Obstacle(f"{name} has no penalty for solved_1se", "Use --model.head_init solved")
    if not module.head_is_new and module.hparams["head_init"] == "auto":
        return Obstacle("it is trained already")
    if not isinstance(data, ImageDataModule):
        return Obstacle("the data does not come from an ImageDataModule", "Use one")
    if lightning_internals.training_loader(trainer) not in (None, data.loaders["train"]):
        return Obstacle("the fit uses its own data loaders", "Use those of the ImageDataModule")
    if getattr(trainer, "fast_dev_run", False):
        return Obstacle("trainer.fast_dev_run runs only a few batches", "Remove it")
    limit = trainer.limit_train_batches
    if trainer.overfit_batches or isinstance(limit, int) or limit < 1:  # type: ignore[attr-defined]
        return Obstacle(
            "trainer.limit_train_batches or overfit_batches leaves out training images",
            "Remove them (--data.per_class uses fewer images)",
        )
    return _memory_obstacle(trainer, module, data)


def _memory_obstacle(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> Obstacle | None:
    fits_itself, is_stored = isinstance(module.head, FittedHead), data.loaders["train"].rows is not None
    if fits_itself and is_stored:
        return None
    budget, values_in_memory = memory_budget(trainer, data)
    if fits_itself:
        values_in_memory //= ProcessGroup().size  # each rank holds all features
    count = len(data.splits["train"])
    if not is_stored and count > values_in_memory // module.backbone.feature_dim:
        return Obstacle(
            "no features are stored, and those of all training images do not fit in memory",
            "Use --features.cache on with --model.trainable head, or fewer images with --data.per_class",
        )
    values = len(module.classes) * module.backbone.feature_dim
    if not fits_itself and FOLDS * (2 * HISTORY + 3) * values * 4 > budget:
        return Obstacle(
            f"{FOLDS} heads of {len(module.classes):,} classes exceed the memory", "Use --model.head_init random"
        )
    if module.cut.trainable and count > values_in_memory // module.backbone.feature_dim:
        return Obstacle(
            "the features do not fit in memory, and the trainable stages would compute them in every pass",
            "Use --model.trainable head, or fewer images with --data.per_class",
        )
    return None


def memory_budget(trainer: pl.Trainer, data: ImageDataModule) -> tuple[int, int]:
    """Bytes for the solver, and the number of feature values that all ranks can hold; equal on all ranks."""
    ranks, copies = ProcessGroup(), COPIES + (data.loaders["train"].rows is None)  # computed features stay in memory
    budget = min(ranks.gather(row_memory_budget(trainer.strategy.root_device, trainer.num_devices)))
    return budget, budget // (4 * copies) * ranks.size


def refuse_settings_of_training(module: ImageClassifier, data: Any) -> None:
    """Refuse the settings that cannot take effect where nothing is trained.

    Args:
        module: The model, whose head has no parameters.
        data: The data module, if any.

    Raises:
        ConfigError: Such a setting is given.
    """
    given = {
        "model.head_init random": module.hparams["head_init"] == "random",
        "data.balance": getattr(data, "balance", "none") != "none",
        "model.class_weights": module.hparams["class_weights"] is not None,
        "model.label_smoothing": bool(module.hparams["label_smoothing"]),
        "model.ema": module.hparams["ema"] is not None,
    }
    if module.last_cut.trainable:
        setting, fix = f"trainable {module.hparams['trainable']}", "trainable head"
        if module.unfreezing is not None:
            setting, fix = "schedule", "schedule null"
        raise ConfigError(
            f"model.{setting} changes the features, and {type(module.head).__name__} is computed from them before "
            f"training. Use --model.{fix}, or another model.head."
        )
    refused = [name for name, is_given in given.items() if is_given]
    if refused:
        raise ConfigError(
            f"{refused[0]} has no effect on {type(module.head).__name__}, which is computed from the training images "
            "and not trained. Remove it, or use another model.head."
        )
