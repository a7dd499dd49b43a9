"""Whether a checkpoint and a model go together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from project.errors import CheckpointError, damaged_checkpoint

FORMAT = 1  # of what a checkpoint holds under "transfer"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    # Milliseconds for each: a checkpoint is written in every epoch, and one over stored rows takes some tens of them.
    return {name: version(name) for name in ("torch", "torchvision", "lightning")}


def validate_identity(theirs: Any, ours: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says of its model with what the model is.

    Args:
        theirs: What the checkpoint holds under ``transfer``.
        ours: The identity of the model that it is to be loaded into.

    Raises:
        CheckpointError: They are of another format, or another backbone, preprocessing or set of classes.
    """
    if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
        raise CheckpointError(
            "This is not a checkpoint that this version's fit wrote. Take one of runs/NAME/version_N/checkpoints."
        )
    then, now = theirs["backbone"], ours["backbone"]
    if then["sha256"] != now["sha256"]:
        raise CheckpointError(
            f"The checkpoint was trained on another backbone: {then['name']} ({then['source']}), this model has "
            f"{now['name']} ({now['source']}); SHA-256 {then['sha256'][:12]}, not {now['sha256'][:12]}.\n"
            "Leave --model.backbone and --model.weights out, and the checkpoint's own are taken."
        )
    if theirs["preprocessing"] != ours["preprocessing"]:
        changed = [key for key, value in ours["preprocessing"].items() if theirs["preprocessing"].get(key) != value]
        told = [f"{key} {theirs['preprocessing'].get(key)}, not {ours['preprocessing'][key]}" for key in changed]
        raise CheckpointError(
            f"The checkpoint was trained on images of another form: {'; '.join(told)}.\n"
            "Leave --model.image_size out, and the checkpoint's own is taken."
        )
    if theirs["classes"] != ours["classes"]:
        raise CheckpointError(
            f"The checkpoint's classes are {theirs['classes']}, the model's {ours['classes']}.\n"
            "Leave --model.classes out, and the checkpoint's own are taken."
        )


def validate_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Compare the tensors that a checkpoint should hold with those that it holds.

    Raises:
        CheckpointError: One is missing, unexpected, or of another shape or type.
    """
    mend = "it was trained with another model.head or model.trainable. Leave these flags out, and its own are taken."
    for kind, names in (("lacks", set(expected) - set(found)), ("has an unexpected", set(found) - set(expected))):
        if names:
            raise CheckpointError(f"The checkpoint {kind} tensor {min(names, key=str)!r}: {mend}")
    for name, tensor in expected.items():
        value = found[name]
        if value.shape != tensor.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"The checkpoint's tensor {name!r} is of shape {shapes}: {mend}")
        # Floats of another width are what trainer.precision bf16-true leaves.
        if value.dtype != tensor.dtype and not (value.is_floating_point() and tensor.is_floating_point()):
            raise damaged_checkpoint(f"The checkpoint is damaged: {name!r} is of {value.dtype}, not {tensor.dtype}.")


def name_groups(checkpoint: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the optimizer's state the groups of this version: earlier ones had one group without a name.

    Args:
        checkpoint: Changed in place.
        groups: The groups that the optimizer will have, by ``name`` and ``params``.
    """
    states = checkpoint.get("optimizer_states")
    for state in states if isinstance(states, list) else ():
        saved = state.get("param_groups") if isinstance(state, dict) else None
        for group in saved if isinstance(saved, list) else ():
            if isinstance(group, dict) and not isinstance(group.get("name", ""), str):
                raise damaged_checkpoint(
                    f"The checkpoint is damaged: a parameter group is called {group['name']!r:.40}."
                )
        if not (isinstance(saved, list) and len(saved) == 1 and isinstance(saved[0], dict)) or "name" in saved[0]:
            continue
        ids = saved[0].get("params")
        if not isinstance(ids, list) or len(ids) != sum(len(group["params"]) for group in groups):
            continue  # refused with the rest of the state
        left = iter(ids)
        state["param_groups"] = [
            {**saved[0], "name": group["name"], "params": [*itertools.islice(left, len(group["params"]))]}
            for group in groups
        ]
        schedules = checkpoint.get("lr_schedulers")
        _repeat(schedules, len(groups))


def _repeat(schedules: Any, groups: int) -> None:
    """Repeat what schedules hold for a single group, those within others too."""
    for schedule in schedules if isinstance(schedules, list) else ():
        if isinstance(schedule, dict):
            for key in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
                if isinstance(schedule.get(key), list) and len(schedule[key]) == 1:
                    schedule[key] = schedule[key] * groups
            _repeat(schedule.get("_schedulers"), groups)
