"""Descriptions of a run for loggers and reports: its data as Markdown, its hyperparameters as a flat mapping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from project.callbacks import drift
from project.callbacks.solved_head import SolvedHead
from project.classifier import ImageClassifier
from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.evaluation.candidates import Weights
from project.evaluation.summary import EvaluationSummary
from project.reporting.limitations import pluralize
from project.runtime import lightning_internals
from project.runtime.seeding import run_seed

MAX_TABLE_ROWS = 200


def data_report(data: ImageDataModule) -> str:
    """Markdown table of the number of images per class and split."""
    classes, splits, counts = data.classes or (), data.splits, data.class_counts
    lines = [
        f"**{data.name}**: {sum(map(len, splits.values())):,} images, {len(classes)} classes",
        "",
        f"| class | {' | '.join(splits)} |",
        f"|---|{'---:|' * len(splits)}",
        f"| *all* | {' | '.join(f'{len(samples):,}' for samples in splits.values())} |",
    ]
    for label, name in enumerate(classes[:MAX_TABLE_ROWS]):
        row = " | ".join(f"{count[label]:,}" for count in counts.values())
        lines.append(f"| {' '.join(name.split()).replace('|', '&#124;')} | {row} |")
    if len(classes) > MAX_TABLE_ROWS:
        lines.append(f"| … {len(classes) - MAX_TABLE_ROWS} more | {'| ' * len(splits)}")
    return "\n".join(lines)


def hyperparameters(trainer: pl.Trainer, module: ImageClassifier) -> dict[str, float | int | str | bool]:
    """Hyperparameters to compare runs by.

    All runs have the same keys: TensorBoard's HParams page only shows the keys of the first run.
    """
    hparams, data = module.hparams, getattr(trainer, "datamodule", None)
    # `defaults` holds the initial values; a scheduler changes those in the parameter groups.
    initial: Mapping[str, Any] = trainer.optimizers[0].defaults if trainer.optimizers else {}
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    values: dict[str, Any] = {
        "backbone": module.backbone.name,
        "weights": module.backbone.origin.weights or "random",
        "trainable": hparams["trainable"],
        "adapter": module.adapter_description,
        "image_size": module.backbone.preprocessing.crop,
        "head": format_class(hparams["head"], module.head),
        "head_init": hparams["head_init"],
        "optimizer": format_class(hparams["optimizer"], *trainer.optimizers[:1]),
        "lr": float(initial.get("lr", 0.0)),
        "weight_decay": float(initial.get("weight_decay", 0.0)),
        "scheduler": format_class(hparams["scheduler"], *schedulers[:1]),
        "label_smoothing": hparams["label_smoothing"],
        "l2_sp": hparams["l2_sp"],
        "ema": hparams["ema"] or 0.0,
        "batch_norm": hparams["batch_norm"],
        "data": getattr(data, "name", ""),
        "classes": len(module.classes),
        "batch_size": getattr(data, "batch_size", 0),
        "augment": format_augmentation(getattr(data, "augment", "")),
        "balance": getattr(data, "balance", ""),
        "epochs": trainer.current_epoch,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "seed": run_seed(),
    }
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in values.items()}


def format_class(described: Mapping[str, Any] | None, instance: object | None = None) -> str:
    """Format a configured class as a call, such as ``SGD(lr=0.001, momentum=0.9)``.

    Args:
        described: ``{"class_path": ..., "init_args": {...}}``; ``None`` gives "none".
        instance: An object of the class. If given, arguments equal to its defaults are omitted; otherwise those that
            are ``None``.
    """
    if described is None:
        return "none"
    spec = ClassSpec.from_dict(described)
    parameters = inspect.signature(type(instance)).parameters if instance is not None else {}
    arguments = []
    for key, value in spec.init_args.items():
        default = parameters[key].default if key in parameters else None
        if value != default and value != (list(default) if isinstance(default, tuple) else default):  # YAML has lists
            arguments.append(f"{key}={value!r}")
    return f"{spec.name}({', '.join(arguments)})" if arguments else spec.name


def format_augmentation(augment: object) -> str:
    """The name of a predefined augmentation, or "custom transforms"."""
    return augment if isinstance(augment, str) else "custom transforms"


def format_weights(weights: Weights) -> str:
    """Describe the weights of ``best.ckpt`` in a fit that averages weights."""
    return "moving average (model.ema)" if weights == "ema" else "raw; their moving average (model.ema) is not better"


def trained_parts(module: ImageClassifier, frozen: Sequence[str] | None = None) -> str:
    """What is trained: the stages or an adapter in them, and the head.

    Args:
        module: The model.
        frozen: Names of the frozen stages; by default those of the current cut.
    """
    frozen, adapter = module.cut.frozen if frozen is None else frozen, module.backbone.adapter
    stages = [name for name in module.backbone.stages if name not in frozen]
    if adapter is None:
        return ", ".join([*stages, "head"])
    return f"{adapter.description} in {', '.join(stages)}; head"


def frozen_parts(module: ImageClassifier) -> str:
    """What is frozen of the backbone."""
    name, cut, adapter = module.backbone.name, module.cut, module.backbone.adapter
    if adapter is not None:
        return f"all tensors of {name} except the adapter ({adapter.description})"
    if not cut.frozen:
        return f"no stage of {name}"
    return f"{', '.join(cut.frozen) if cut.trainable else 'all stages'} of {name}"


def trained_parameters(module: ImageClassifier, frozen: Sequence[str] | None = None) -> int:
    """Number of the trained parameters, head included.

    Args:
        module: The model.
        frozen: Names of the frozen stages; by default those of the current cut.
    """
    frozen = module.cut.frozen if frozen is None else frozen
    parts = [stage for name, stage in module.backbone.stages.items() if name not in frozen]
    parameters = (parameter for part in [*parts, module.head] for parameter in part.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def head_method(trainer: pl.Trainer) -> str | None:
    """How the initial head of a fit was computed; ``None`` if it was not."""
    callback = lightning_internals.find_callback(trainer, SolvedHead)
    return None if callback is None else callback.method


def starting_checkpoint(trainer: pl.Trainer, module: ImageClassifier) -> str | None:
    """The checkpoint whose weights a fit started from; ``None`` if there is none, or if nothing of it is left."""
    # A computed head on a frozen backbone depends on no earlier weights.
    is_replaced = head_method(trainer) is not None and not module.cut.trainable
    return None if is_replaced else module.start


def format_drift(evaluation: EvaluationSummary) -> str | None:
    """How similar the features are to the pretrained ones; ``None`` if it was not measured."""
    similarity = evaluation.metrics.get(drift.METRIC)
    if similarity is None:
        return None
    images = pluralize(min(evaluation.images, drift.MAX_IMAGES), "validation image")
    return f"CKA {similarity:.3f} with the pretrained ones on {images}"
