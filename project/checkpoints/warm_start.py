"""Start a new fit from the weights of a checkpoint, with more classes or another cut, instead of resuming its fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from project.checkpoints.compatibility import validate_tensors
from project.errors import CheckpointError
from project.models.backbone import stage_prefix

Tensors = Mapping[str, torch.Tensor]


def added_classes(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The classes that were added; empty if none were, or if others were removed or renamed."""
    return [name for name in now if name not in before] if set(before) < set(now) else []


def starting_tensors(
    fresh: Tensors, saved: Tensors, frozen: Sequence[str], before: Sequence[str], now: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The trained tensors of a new fit that starts from a checkpoint.

    A head can be extended if each of its tensors that depends on the number of classes has one row per class, as the
    weight and the bias of a linear layer. Rows are matched by class name.

    Args:
        fresh: Tensors of the new model's trainable stages, pretrained, and of its head, with initial weights.
        saved: The same of the checkpoint.
        frozen: Stages that the checkpoint's fit has frozen. They stay pretrained.
        before: Class names of the checkpoint.
        now: Class names of the new model: those of the checkpoint, in any order, and others.

    Raises:
        CheckpointError: A tensor is missing or unexpected, or has another shape or type.
    """
    stages = tuple(stage_prefix(name) for name in frozen)
    pretrained = {name: tensor for name, tensor in fresh.items() if name.startswith(stages)}
    expected = {name: tensor for name, tensor in fresh.items() if name not in pretrained}
    rows = torch.tensor([now.index(name) for name in before])
    extended = {}
    for name, value in saved.items():
        target = expected.get(name)
        if target is not None and _has_row_per_class(value, target, len(before), len(now)):
            extended[name] = target.detach().clone().index_copy_(0, rows, value.to(target))
        else:
            extended[name] = value
    validate_tensors(expected, extended)
    return {**pretrained, **extended}


def require_extendable(head: str, fresh: Tensors, saved: Tensors, before: int, now: int) -> None:
    """Check that a head of the same class and arguments can get more classes.

    Args:
        head: Name of the head's class.
        fresh: Tensors of the new model.
        saved: Tensors of the checkpoint.
        before: Number of classes of the checkpoint.
        now: Number of classes of the new model.

    Raises:
        CheckpointError: A tensor depends on the number of classes in another way than one row per class.
    """
    for name, value in saved.items():
        target = fresh.get(name)
        if target is not None and value.shape != target.shape and not _has_row_per_class(value, target, before, now):
            raise CheckpointError(
                f"model.head: {head} cannot get more classes: its tensor {name!r} changes from shape "
                f"{tuple(value.shape)} to {tuple(target.shape)},\nbut only rows, one per class, can be added. "
                "Start a new fit without --ckpt_path."
            )


def _has_row_per_class(value: torch.Tensor, target: torch.Tensor, before: int, now: int) -> bool:
    if value.shape == target.shape or not (value.is_floating_point() and target.is_floating_point()):
        return False
    return value.shape == (before, *target.shape[1:]) and target.shape[:1] == (now,)
