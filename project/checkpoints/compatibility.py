"""Whether a checkpoint and a model go together, and what of a checkpoint gives way to what was asked for anew."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from project.errors import CheckpointError, damaged

FORMAT = 1  # of what a checkpoint holds under "transfer"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    # Milliseconds for each: a checkpoint is written in every epoch, and one over stored rows takes some tens of them.
    return {name: version(name) for name in ("torch", "torchvision", "lightning")}


def refuse_another(theirs: Any, ours: Mapping[str, Any]) -> None:
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


def refuse_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
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
            raise damaged(f"The checkpoint is damaged: {name!r} is of {value.dtype}, not {tensor.dtype}.")


def let_flags_win(checkpoint: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """On a resume, let an optimizer and a scheduler that were asked for anew beat those of the checkpoint.

    What is another class begins with no state; of the same class, the arguments that differ are taken over.

    Args:
        checkpoint: Changed in place: the states of its optimizer and its scheduler.
        asked: The model's hyper-parameters; ``optimizer`` and ``scheduler`` are ``{"class_path": ..., "init_args":
            {...}}``, the scheduler may be ``None``.
    """
    kept = checkpoint["hyper_parameters"]
    optimizers, schedulers = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    if optimizers:
        changed = _changed(kept["optimizer"], asked["optimizer"])
        if changed is None:
            checkpoint["optimizer_states"] = []
        elif changed:
            if "lr" in changed:
                changed["initial_lr"] = changed["lr"]
                for schedule in schedulers or []:
                    schedule["base_lrs"] = [changed["lr"] for _ in schedule.get("base_lrs", [])]
            for group in optimizers[0]["param_groups"]:
                group.update({key: value for key, value in changed.items() if key in group})
    if schedulers:
        changed = _changed(kept["scheduler"], asked["scheduler"])
        if changed is None:
            checkpoint["lr_schedulers"] = []
        else:
            schedulers[0].update({key: value for key, value in changed.items() if key in schedulers[0]})


def _changed(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments that differ; ``None`` where the class does."""
    if then is None or now is None:
        return {} if then is now else None
    if then["class_path"].rpartition(".")[2] != now["class_path"].rpartition(".")[2]:
        return None
    return {key: value for key, value in now["init_args"].items() if then["init_args"].get(key) != value}
