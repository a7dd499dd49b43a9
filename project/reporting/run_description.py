"""A run in words and in a few numbers: its data, and what it was made with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.runtime.seeding import run_seed

MOST_LINES = 200  # of a table


def data_report(data: ImageDataModule) -> str:
    """How many images each class has in each split, in Markdown."""
    classes, splits, counts = data.classes or (), data.splits, data.class_counts
    lines = [
        f"**{data.name}**: {sum(map(len, splits.values())):,} images of {len(classes)} classes",
        "",
        f"| class | {' | '.join(splits)} |",
        f"|---|{'---:|' * len(splits)}",
        f"| *all* | {' | '.join(f'{len(samples):,}' for samples in splits.values())} |",
    ]
    for label, name in enumerate(classes[:MOST_LINES]):
        row = " | ".join(f"{count[label]:,}" for count in counts.values())
        lines.append(f"| {' '.join(name.split()).replace('|', '&#124;')} | {row} |")
    if len(classes) > MOST_LINES:
        lines.append(f"| … {len(classes) - MOST_LINES} more | {'| ' * len(splits)}")
    return "\n".join(lines)


def parameters(trainer: pl.Trainer, module: ImageClassifier) -> dict[str, float | int | str | bool]:
    """What runs are told apart by. The names are the same for all: TensorBoard shows those that its first run has."""
    given, data = module.hparams, getattr(trainer, "datamodule", None)
    # As they were before any scheduler; a scheduler's name is beside them.
    settings: Mapping[str, Any] = trainer.optimizers[0].defaults if trainer.optimizers else {}
    found: dict[str, Any] = {
        "backbone": module.backbone.name,
        "weights": module.backbone.origin.weights or "random",
        "trainable": given["trainable"],
        "image_size": module.backbone.preprocessing.crop,
        "head": _said(given["head"], module.head),
        "optimizer": _said(given["optimizer"], *trainer.optimizers),
        "lr": float(settings.get("lr", 0.0)),
        "weight_decay": float(settings.get("weight_decay", 0.0)),
        "scheduler": _said(given["scheduler"], *(each.scheduler for each in trainer.lr_scheduler_configs)),
        "label_smoothing": given["label_smoothing"],
        "data": getattr(data, "name", ""),
        "classes": len(module.classes),
        "batch_size": getattr(data, "batch_size", 0),
        "augment": _said(getattr(data, "augment", "")),
        "balance": getattr(data, "balance", ""),
        "epochs": trainer.current_epoch,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
        "seed": run_seed(),
    }
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in found.items()}


def _said(part: Any, *made: object) -> str:
    """A class and the arguments that are not its defaults in a word, such as ``SGD(lr=0.001, momentum=0.9)``.

    Args:
        part: The class and its arguments; ``None`` for none; or a word.
        made: What was made of it, if anything.
    """
    if not isinstance(part, Mapping):
        return "none" if part is None else part if isinstance(part, str) else "transforms"
    name = str(part["class_path"]).rpartition(".")[2]
    defaults = inspect.signature(type(made[0])).parameters if made else {}
    arguments = [
        f"{key}={value}"
        for key, value in (part.get("init_args") or {}).items()
        if key not in defaults or value not in (defaults[key].default, _listed(defaults[key].default))
    ]
    return f"{name}({', '.join(arguments)})" if arguments else name


def _listed(value: Any) -> Any:
    """As a config file has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
