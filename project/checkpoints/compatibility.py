"""Checks that a checkpoint fits a model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from project.errors import CheckpointError, DataError, damaged_checkpoint
from project.models.parameter_groups import ALL, parameter_indices

FORMAT = 1  # version of the checkpoint's "transfer" entry


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that a checkpoint depends on."""
    # Cached: a lookup takes milliseconds, and an epoch on stored rows, which ends with a checkpoint, takes only tens.
    return {name: version(name) for name in ("torch", "torchvision", "lightning")}


def validate_identity(saved: Any, model: Mapping[str, Any]) -> None:
    """Compare the identity in a checkpoint with that of the model.

    Args:
        saved: The checkpoint's ``transfer`` entry.
        model: Identity of the model that the checkpoint is loaded into.

    Raises:
        CheckpointError: The format, backbone, preprocessing or classes differ.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(
            "The checkpoint was not written by this version's fit. Use one from runs/NAME/version_N/checkpoints."
        )
    trained, current = saved["backbone"], model["backbone"]
    if trained["sha256"] != current["sha256"]:
        raise CheckpointError(
            f"The backbones differ: the checkpoint has {trained['name']} ({trained['source']}), the model has "
            f"{current['name']} ({current['source']}); SHA-256 {trained['sha256'][:12]} and {current['sha256'][:12]}.\n"
            "Omit --model.backbone and --model.weights to use the checkpoint's."
        )
    if saved["preprocessing"] != model["preprocessing"]:
        differences = [
            f"{key} is {saved['preprocessing'].get(key)} in the checkpoint and {value} in the model"
            for key, value in model["preprocessing"].items()
            if saved["preprocessing"].get(key) != value
        ]
        raise CheckpointError(
            f"The preprocessing differs: {'; '.join(differences)}.\nOmit --model.image_size to use the checkpoint's."
        )
    features = saved.get("features", "last")  # earlier versions had no others
    if features != model["features"]:
        raise CheckpointError(
            f"model.features differs: it is {features} in the checkpoint and {model['features']} in the model.\n"
            "Omit --model.features to use the checkpoint's."
        )
    if saved["classes"] != model["classes"]:
        raise CheckpointError(
            f"The classes differ: the checkpoint has {saved['classes']}, the model has {model['classes']}.\n"
            "Omit --model.classes to use the checkpoint's."
        )


def validate_classes(data: Sequence[str], model: Sequence[str]) -> None:
    """Compare the classes of the data with those of a model.

    Raises:
        DataError: The names or their order differ.
    """
    if tuple(data) != tuple(model):
        raise DataError(
            f"The data's classes ({', '.join(data)}) are not the model's ({', '.join(model)})."
            "\nUse the data that the model was trained on, or start a new fit without --ckpt_path and --model.classes."
        )


def validate_tensors(expected: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Compare the tensors that a checkpoint must contain with those that it contains.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or has another shape or type.
    """
    fix = "it was trained with another model.head or model.trainable. Omit these flags to use the checkpoint's."
    for problem, names in (("lacks", set(expected) - set(saved)), ("has an unexpected", set(saved) - set(expected))):
        if names:
            raise CheckpointError(f"The checkpoint {problem} tensor {min(names, key=str)!r}: {fix}")
    for name, tensor in expected.items():
        value = saved[name]
        if value.shape != tensor.shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(tensor.shape)}"
            raise CheckpointError(f"The checkpoint's tensor {name!r} has shape {shapes}: {fix}")
        # trainer.precision bf16-true saves floats of another width, which is accepted.
        if value.dtype != tensor.dtype and not (value.is_floating_point() and tensor.is_floating_point()):
            raise damaged_checkpoint(
                f"The checkpoint is damaged: {name!r} has type {value.dtype}, expected {tensor.dtype}."
            )


def match_parameter_groups(
    checkpoint: dict[str, Any], groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Regroup the optimizer state of a checkpoint as the optimizer of the fit groups its parameters.

    Earlier versions had one unnamed group, or one per stage. A group of a stage is split, or its parts are joined, if
    only one of the two optimizers decays weights. Each parameter keeps its state, and each group its settings.

    Args:
        checkpoint: Changed in place.
        groups: The trainable parameters, see :func:`project.models.parameter_groups.stage_groups`.
        names: Names of the groups of the fit's optimizer.

    Raises:
        CheckpointError: A group's name is not a string.
    """
    states = checkpoint.get("optimizer_states")
    for state in states if isinstance(states, list) else ():
        saved = state.get("param_groups") if isinstance(state, dict) else None
        if not (isinstance(saved, list) and saved and all(isinstance(group, dict) for group in saved)):
            continue  # validate_states reports it
        for group in saved:
            if not isinstance(group.get("name", ""), str):
                raise damaged_checkpoint(
                    f"The checkpoint is damaged: a parameter group has the name {group['name']!r:.40}."
                )
        before = [group.get("name", ALL) for group in saved]
        indices, wanted = parameter_indices(before, groups), parameter_indices(names, groups)
        ids = [group.get("params") for group in saved]
        if before == [*names] or indices is None or wanted is None:
            continue
        group_of = {index: number for number, members in enumerate(indices) for index in members}
        lengths = [len(item) if isinstance(item, list) else None for item in ids]
        if lengths != [*map(len, indices)] or len(group_of) != sum(len(group["params"]) for group in groups):
            continue  # validate_states reports it
        id_of = dict(zip(itertools.chain(*indices), itertools.chain(*ids), strict=True))
        origins = [group_of[members[0]] for members in wanted]
        state["param_groups"] = [
            {**saved[origin], "name": name, "params": [id_of[index] for index in members]}
            for origin, name, members in zip(origins, names, wanted, strict=True)
        ]
        _rearrange_rates(checkpoint.get("lr_schedulers"), len(saved), origins)


def _rearrange_rates(schedulers: Any, count: int, origins: Sequence[int]) -> None:
    """Rearrange the schedulers' values of each of ``count`` groups as the groups, also in nested schedulers."""
    for scheduler in schedulers if isinstance(schedulers, list) else ():
        if isinstance(scheduler, dict):
            for key in ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "base_momentums", "max_momentums"):
                if isinstance(scheduler.get(key), list) and len(scheduler[key]) == count:
                    scheduler[key] = [scheduler[key][origin] for origin in origins]
            _rearrange_rates(scheduler.get("_schedulers"), count, origins)
