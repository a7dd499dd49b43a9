"""Whether a checkpoint and a model go together, and what of a checkpoint gives way to what was asked for anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from project.errors import CheckpointError

FORMAT = 1  # of what a checkpoint holds under "transfer"


def refuse_another(theirs: Any, ours: Mapping[str, Any]) -> None:
    """Compare what a checkpoint says of its model with what the model is.

    Args:
        theirs: What the checkpoint holds under ``transfer``.
        ours: The identity of the model that it is to be loaded into.

    Raises:
        CheckpointError: They are of another format, or another backbone, preprocessing or set of classes.
    """
    if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
        raise CheckpointError("This is not a checkpoint of this project (or of a newer version of it).")
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
        raise CheckpointError(f"The checkpoint's classes are {theirs['classes']}, the model's {ours['classes']}.")


def refuse_tensors(expected: Collection[str], found: Collection[str]) -> None:
    """Compare the names of the tensors that a checkpoint should hold with those that it holds.

    Raises:
        CheckpointError: One is missing or unexpected.
    """
    for kind, names in (("lacks", set(expected) - set(found)), ("has an unexpected", set(found) - set(expected))):
        if names:
            raise CheckpointError(
                f"The checkpoint {kind} tensor {min(names)!r}: it was trained with another model.head or "
                "model.trainable. Leave these flags out, and the checkpoint's own are taken."
            )


def let_flags_win(checkpoint: dict[str, Any], optimizer: Mapping[str, Any]) -> None:
    """On a resume, let an optimizer's class and arguments that were given anew beat those of the checkpoint.

    Args:
        checkpoint: Changed in place: its optimizer's state, and its schedulers' base learning rates.
        optimizer: What the model is asked to use, as ``{"class_path": ..., "init_args": {...}}``.
    """
    then = checkpoint["hyper_parameters"].get("optimizer")
    if not checkpoint.get("optimizer_states") or then == optimizer:
        return
    if then["class_path"].rpartition(".")[2] != optimizer["class_path"].rpartition(".")[2]:
        checkpoint["optimizer_states"] = []  # another optimizer begins with no state
        return
    changed = {k: v for k, v in optimizer["init_args"].items() if then["init_args"].get(k) != v}
    if "lr" in changed:
        changed["initial_lr"] = changed["lr"]
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group.update({key: value for key, value in changed.items() if key in group})
    for schedule in checkpoint.get("lr_schedulers", []):
        if "lr" in changed and "base_lrs" in schedule:
            schedule["base_lrs"] = [changed["lr"]] * len(schedule["base_lrs"])
