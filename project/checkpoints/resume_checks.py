"""Checks of a checkpoint's training state before a fit is resumed from it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.errors import CheckpointError, abbreviate, damaged_checkpoint

#: Parameter groups, each with ``name`` and ``params``.
Groups = Sequence[Mapping[str, Any]]
#: Constructs the optimizer and the scheduler of parameter groups.
Construct = Callable[[Groups], tuple[Optimizer, LRScheduler | None]]
#: Keys of ModelCheckpoint's state with paths of files that it may remove later.
PATH_KEYS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")


def copy_groups(groups: Groups, device: str = "meta") -> list[dict[str, Any]]:
    """Copies of parameter groups with zeros as parameters.

    Args:
        groups: Parameter groups.
        device: Device of the copies; on the meta device they take no memory.
    """
    return [
        {**group, "params": [nn.Parameter(torch.zeros_like(p, device=device)) for p in group["params"]]}
        for group in groups
    ]


def validate_states(checkpoint: Mapping[str, Any], groups: Groups, construct: Construct) -> None:
    """Check the states of callbacks, optimizer and scheduler.

    Torch and Lightning restore them unchecked: an error would appear a step or an epoch later.

    Args:
        checkpoint: As read, with plain types and tensors.
        groups: The trainable parameters, from :func:`copy_groups`.
        construct: Constructs their optimizer and scheduler.

    Raises:
        CheckpointError: A state is damaged, or a callback's state has an unsafe path.
    """
    _refuse_unsafe_paths(checkpoint.get("callbacks"))
    states, schedulers = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    if not states and not schedulers:
        return
    error = _try_step(construct, groups, states, schedulers)
    if error is None or _try_step(construct, groups, None, None):  # this optimizer cannot step on the meta device
        return
    # The states may still be valid: NAdam, for example, reads a value from its state, and meta tensors have no values.
    error = _try_step(construct, copy_groups(groups, "cpu"), states, schedulers)
    if error:
        raise damaged_checkpoint(
            "The checkpoint is damaged: its optimizer or scheduler state cannot be restored "
            f"({type(error).__name__}: {str(error) or 'no details'})."
        )


def validate_progress(saved: Any, fresh: Any, place: str) -> None:
    """Check the counts of the training loops.

    Args:
        saved: The checkpoint's loop state, or a part of it.
        fresh: The same part of the loop state before a run.
        place: Its key in the checkpoint, for the message.

    Raises:
        CheckpointError: A count is missing, negative, or has another type.
    """
    if type(saved) is not type(fresh) or (isinstance(fresh, int) and saved < 0):
        raise damaged_checkpoint(f"The checkpoint is damaged: {place} cannot be {abbreviate(saved, 40)}.")
    for key, value in fresh.items() if isinstance(fresh, dict) else ():
        if key not in saved:
            raise damaged_checkpoint(f"The checkpoint is damaged: {place}.{key} is missing.")
        validate_progress(saved[key], value, f"{place}.{key}")


def refuse_interpolated(identity: Mapping[str, Any]) -> None:
    """Refuse to resume a fit from interpolated weights: no step has led to them, and no optimizer state fits them.

    Args:
        identity: The checkpoint's ``transfer`` entry.

    Raises:
        CheckpointError: The weights are interpolated.
    """
    if identity.get("interpolated") is not None:
        raise CheckpointError(
            "The checkpoint has interpolated weights (model.interpolate), so its fit cannot be resumed from it.\n"
            "Use last.ckpt or best_epoch.ckpt of the same folder."
        )


def _refuse_unsafe_paths(callbacks: Any) -> None:
    """Refuse paths that lead ModelCheckpoint out of its folder.

    ModelCheckpoint removes the previous best file, at the path that the checkpoint gives. Its own check that the file
    is in its folder accepts ``FOLDER/../../other`` and any URL.
    """
    if callbacks is not None and not (
        isinstance(callbacks, dict) and all(isinstance(state, dict) for state in callbacks.values())
    ):
        raise damaged_checkpoint("The checkpoint is damaged: the states of its callbacks are not dicts.")
    for name, state in (callbacks or {}).items():
        for key in PATH_KEYS:
            value = state.get(key) or ""
            for path in value if isinstance(value, dict) else [value]:
                if path and not (isinstance(path, str) and path == os.path.normpath(path)):
                    raise CheckpointError(
                        f"The checkpoint is unsafe: {key} of {name!s:.40} is not a normalized path: {path!r}."
                    )


def _try_step(construct: Construct, groups: Groups, states: Any, schedulers: Any) -> Exception | None:
    """Restore the states and take a step with zero gradients; returns the exception that this raises, if any."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, scheduler = construct(groups)
            if states:
                optimizer.load_state_dict(_copy_state(states[0], groups[0]["params"][0].device))
            if schedulers and scheduler is not None:
                scheduler.load_state_dict(copy.deepcopy(dict(schedulers[0])))
            for parameter in (parameter for group in groups for parameter in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(0.0)
            elif scheduler is not None:
                scheduler.step()
    except Exception as error:  # any class of optimizer may raise anything
        return error
    return None


def _copy_state(value: Any, device: torch.device) -> Any:
    """Copy an optimizer state: the optimizer would modify the checkpoint's tensors, such as step counts, in place."""
    if isinstance(value, dict):
        return {key: _copy_state(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy_state(item, device) for item in value]
    if isinstance(value, torch.Tensor):
        return value.clone() if value.numel() == 1 or device.type != "meta" else torch.empty_like(value, device="meta")
    return value
