"""Reading a checkpoint safely: nothing in it is executed, and what is not of the form that fit writes is refused."""

from __future__ import annotations

import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from project.config.class_path import ClassSpec
from project.errors import CheckpointError, ConfigError, abbreviate, damaged_checkpoint

Checkpoint = dict[str, Any]
MAGIC = b"PK\x03\x04"  # of a zip file, as torch.save writes; its two older formats need more of pickle
LARGEST = 4096  # pixels of a side: a network is tried at its size before anything else would tell

TEXT = (str,)
NUMBERS = [(int, float)]
#: The form of what a checkpoint has to hold: types, ``[form]`` of a list's items, or a dict's keys with the form of
#: each. Keys besides these are taken elsewhere, or by nobody.
FORM: dict[str, Any] = {
    "epoch": (int,),
    "global_step": (int,),
    "pytorch-lightning_version": TEXT,
    "state_dict": (dict,),
    "hyper_parameters": {
        "backbone": TEXT,
        "weights": (str, types.NoneType),
        "trainable": TEXT,
        "head": (dict,),
        "optimizer": (dict,),
        "classes": [TEXT],
    },
    "transfer": {
        "format": (int,),
        "classes": [TEXT],
        "preprocessing": {"resize": (int,), "crop": (int,), "interpolation": TEXT, "mean": NUMBERS, "std": NUMBERS},
        "backbone": {"name": TEXT, "weights": (str, types.NoneType), "source": TEXT, "sha256": TEXT},
        "frozen": {"stages": [TEXT], "sha256": TEXT},
    },
}


def read_checkpoint(path: str | Path) -> Checkpoint:
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
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                raise ValueError("no zip file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused later
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise damaged_checkpoint(
            f"{path} cannot be loaded as plain tensors: it is damaged or holds code ({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("transfer"), dict):
        raise CheckpointError(
            f"{path} is not a checkpoint that fit wrote. Take one of runs/NAME/version_N/checkpoints."
        )
    try:
        validate_form(checkpoint)
    except CheckpointError as error:
        raise CheckpointError("{path}: {reason}", path=path, reason=error) from error
    return checkpoint


def validate_form(checkpoint: Any) -> None:
    """Refuse what lacks a part that every checkpoint has, or has one of another type.

    Raises:
        CheckpointError: It names the part.
    """
    wrong = _wrong(checkpoint, FORM)
    if wrong:
        raise damaged_checkpoint(f"The checkpoint is damaged, or of another version: {wrong}.")
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type == "meta":
            raise damaged_checkpoint(f"The checkpoint is damaged: {name!r} in its state_dict is no dense tensor.")


def hyper_parameters(checkpoint: Mapping[str, Any], path: str | Path, of: type, **parts: type) -> dict[str, Any]:
    """The arguments that a checkpoint's model was made with, in plain types.

    Args:
        checkpoint: What :func:`read_checkpoint` has read.
        path: Where from, for the message.
        of: The class of the model: its constructor's annotations say of what types they have to be.
        parts: The arguments that name a class, and of what kind it has to be.

    Raises:
        CheckpointError: One is unknown, of another type, or names a class that may not be imported.
    """
    values = dict(checkpoint["hyper_parameters"])
    if values.get("scheduler") is not None:
        values.setdefault("scheduler_interval", "epoch")  # of earlier versions, which knew no other
    hints = {name: hint for name, hint in typing.get_type_hints(of.__init__).items() if name != "return"}  # type: ignore[misc]
    for name in values.keys() - hints.keys():
        raise damaged_checkpoint(f"{path} is damaged, or of another version: an unknown hyper-parameter {name!r}.")
    for name, value in values.items():
        if name not in parts and not _is(value, hints[name]):
            raise damaged_checkpoint(f"{path}: model.{name} cannot be {abbreviate(value)}.")
        if name in parts and not (value is None and type(None) in typing.get_args(hints[name])):
            try:
                if not isinstance(value, dict) or _names_classes(value.get("init_args")):
                    raise ConfigError(f"it cannot be {abbreviate(value)}.")
                ClassSpec.from_dict(value).resolve(parts[name])
            except ConfigError as error:
                raise CheckpointError(f"{path}: model.{name}: {error}") from error
    if (values.get("image_size") or 0) > LARGEST:
        raise damaged_checkpoint(f"{path}: model.image_size {values['image_size']} is more than {LARGEST}.")
    return values


def _wrong(value: Any, form: Any, place: str = "") -> str | None:
    """Say where a value is not of a form; ``None`` where it is."""
    if isinstance(form, tuple):
        expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in form)
        fits = isinstance(value, form) and not isinstance(value, bool)
        return None if fits else f"{place} is of type {type(value).__name__}, not {expected}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is of type {type(value).__name__}, not list"
        return next(filter(None, (_wrong(item, form[0], f"an item of {place}") for item in value)), None)
    if not isinstance(value, dict):
        return f"{place} is of type {type(value).__name__}, not dict"
    for key, inner in form.items():
        name = f"{place}.{key}".lstrip(".")
        wrong = _wrong(value[key], inner, name) if key in value else f"{name} is missing"
        if wrong:
            return wrong
    return None


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: scalars, their lists, and unions of these."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_is(item, typing.get_args(hint)[0]) for item in value)
    kinds: Callable[..., Any] | tuple[type, ...] = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))  # type: ignore[arg-type]


def _names_classes(value: Any) -> bool:
    """Whether there is a ``class_path`` somewhere inside: fit never writes one there, but the parser would make it."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_classes, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_classes, value))
