"""Whether a run can go on from a checkpoint: what it holds besides the model is tried before anything relies on it."""

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

#: Parameter groups, by ``name`` and ``params``.
Groups = Sequence[Mapping[str, Any]]
#: Makes the optimizer and the scheduler of what trains.
Make = Callable[[Groups], tuple[Optimizer, LRScheduler | None]]
#: Where a state of ModelCheckpoint has the path of a file that it may remove later.
PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")


def on_meta(groups: Groups) -> list[dict[str, Any]]:
    """The same groups of parameters without memory."""
    return _on(groups, "meta")


def _on(groups: Groups, device: str) -> list[dict[str, Any]]:
    return [
        {**group, "params": [nn.Parameter(torch.zeros_like(each, device=device)) for each in group["params"]]}
        for group in groups
    ]


def validate_states(checkpoint: Mapping[str, Any], groups: Groups, make: Make) -> None:
    """Refuse callbacks that name other files, and an optimizer and a scheduler that cannot go on.

    Torch and Lightning take these over as they are: what is wrong with them shows a step later, or an epoch.

    Args:
        checkpoint: As read, plain types and tensors.
        groups: What trains, without memory: see :func:`on_meta`.
        make: Makes their optimizer and scheduler.

    Raises:
        CheckpointError: The states are damaged, or not to be trusted.
    """
    _refuse_paths(checkpoint.get("callbacks"))
    states, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    if not states and not schedules:
        return
    failed = _rehearse(make, groups, states, schedules)
    if failed and not _rehearse(make, groups, None, None):  # else this optimizer cannot be tried in this way
        # NAdam, for one, reads a number from its state, which has none without memory.
        failed = _rehearse(make, _on(groups, "cpu"), states, schedules)
    else:
        failed = None
    if failed:
        raise damaged_checkpoint(
            "The checkpoint is damaged: its optimizer or its scheduler cannot go on from the state that it holds "
            f"({type(failed).__name__}: {str(failed) or 'no more is known'})."
        )


def validate_progress(found: Any, fresh: Any, place: str) -> None:
    """Refuse counts of loops that are none.

    Args:
        found: What a checkpoint holds of the loops, or of a part of them.
        fresh: What would be saved of them before a run.
        place: Where in the checkpoint, for the message.

    Raises:
        CheckpointError: One is missing, or of another type.
    """
    if type(found) is not type(fresh) or (isinstance(fresh, int) and found < 0):
        raise damaged_checkpoint(f"The checkpoint is damaged: {place} cannot be {abbreviate(found, 40)}.")
    for key, value in fresh.items() if isinstance(fresh, dict) else ():
        if key not in found:
            raise damaged_checkpoint(f"The checkpoint is damaged: {place}.{key} is missing.")
        validate_progress(found[key], value, f"{place}.{key}")


def _refuse_paths(callbacks: Any) -> None:
    """ModelCheckpoint removes the best file so far for a better one, wherever a checkpoint says that it is.

    It does look whether it lies in its own folder, but ``OWN/../../else`` does by that look, and so does any URL.
    """
    if callbacks is not None and not (
        isinstance(callbacks, dict) and all(isinstance(v, dict) for v in callbacks.values())
    ):
        raise damaged_checkpoint("The checkpoint is damaged: the states of its callbacks are none.")
    for name, state in (callbacks or {}).items():
        for key in PATHS:
            value = state.get(key) or ""
            for path in value if isinstance(value, dict) else [value]:
                if path and not (isinstance(path, str) and path == os.path.normpath(path)):
                    raise CheckpointError(f"The checkpoint's {name!s:.40} has a {key} that is no plain path: {path!r}.")


def _rehearse(make: Make, groups: Groups, states: Any, schedules: Any) -> Exception | None:
    """Take a step on parameters of zeros, or without memory; gives what it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, scheduler = make(groups)
            if states:
                optimizer.load_state_dict(_copied(states[0], groups[0]["params"][0].device))
            if schedules and scheduler is not None:
                scheduler.load_state_dict(copy.deepcopy(dict(schedules[0])))
            for parameter in (each for group in groups for each in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(0.0)
            elif scheduler is not None:
                scheduler.step()
    except Exception as error:  # anything, of any optimizer
        return error
    return None


def _copied(value: Any, device: torch.device) -> Any:
    """A copy that a step may change: an optimizer takes a state's tensors over as they are, counts of steps too."""
    if isinstance(value, dict):
        return {key: _copied(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(each, device) for each in value]
    if isinstance(value, torch.Tensor):
        return value.clone() if value.numel() == 1 or device.type != "meta" else torch.empty_like(value, device="meta")
    return value
