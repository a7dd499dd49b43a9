"""Reading a checkpoint safely, before any model is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.components import resolve
from project.errors import CheckpointError, ConfigError

#: Parts of the hyper-parameters that name a class, and what kind of class it has to be.
PARTS: dict[str, type] = {
    "head": nn.Module,
    "optimizer": Optimizer,
    "scheduler": LRScheduler,
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's plain types and tensors; nothing in it is executed.

    Args:
        path: A ``.ckpt`` file of this project.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: It is missing, damaged, holds code, or is not one of this project's.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. A fit writes them to runs/NAME/version_N/checkpoints.")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise CheckpointError(
            f"{path} cannot be loaded as plain tensors: it is damaged or holds code ({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("transfer"), dict):
        raise CheckpointError(
            f"{path} is not a checkpoint that fit wrote. Take one of runs/NAME/version_N/checkpoints."
        )
    return checkpoint


#: How a fit has held images out, and of what type each setting is.
SPLIT: dict[str, tuple[type, ...]] = {
    "val_fraction": (float, int),
    "test_fraction": (float, int),
    "fold": (str, type(None)),
    "split_seed": (int,),
}


def split_settings(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """How images were held out of what the checkpoint's model was trained on; empty if it does not say.

    Args:
        checkpoint: What :func:`read_checkpoint` has read.
        path: Where from, for the message.

    Raises:
        CheckpointError: What it says makes no sense.
    """
    values = checkpoint["transfer"].get("split") or {}
    if not isinstance(values, dict) or any(not isinstance(values.get(key), SPLIT.get(key, ())) for key in values):
        raise CheckpointError(f"{path} does not say in a way that makes sense how images were held out: {values}.")
    return values


def hyper_parameters(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The arguments that a checkpoint's model was made with, in plain types.

    Args:
        checkpoint: What :func:`read_checkpoint` has read.
        path: Where from, for the message.

    Raises:
        CheckpointError: It names a class that may not be imported.
    """
    values = dict(checkpoint["hyper_parameters"])
    for part, base in PARTS.items():
        if values.get(part) is not None:
            try:
                resolve(values[part], base)
            except ConfigError as error:
                raise CheckpointError(f"{path}: model.{part}: {error}") from error
    return values


def epochs_of(checkpoint: Mapping[str, Any]) -> int:
    """How many epochs a checkpoint's fit has been through, to their end."""
    done: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return done


def seed_of(checkpoint: Mapping[str, Any]) -> int:
    """The seed of a checkpoint's fit."""
    seed: int = checkpoint["resume"]["seed"]
    return seed
