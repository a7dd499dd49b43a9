"""Safe reading of checkpoints: no code is executed, and contents that do not match the schema are refused."""

from __future__ import annotations

import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from project.checkpoints import hub
from project.config.class_path import ClassSpec
from project.errors import CheckpointError, ConfigError, abbreviate, damaged_checkpoint

Checkpoint = dict[str, Any]
ZIP_MAGIC = b"PK\x03\x04"  # torch.save writes a zip file; its two older formats need a larger part of pickle
MAX_IMAGE_SIZE = 4096  # pixels; loading runs the network at this size, so a huge value would exhaust the memory

TEXT = (str,)
NUMBERS = [(int, float)]
#: Required entries of a checkpoint. A tuple lists the allowed types, ``[schema]`` is a list of such items, and a dict
#: gives the schema of each key. Other keys are not checked here.
SCHEMA: dict[str, Any] = {
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


def read_checkpoint(path: str | Path, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint's tensors, on the CPU, and plain types; no code in it is executed.

    Args:
        path: A ``.ckpt`` file of this project, or ``hf://USER/NAME`` for a repository on the Hugging Face Hub.
        mmap: Map the tensors into memory instead of reading them, for a caller that needs only the rest.

    Raises:
        CheckpointError: The file is missing, damaged, contains code, or was not written by this project.
        ConfigError: The address on the hub is invalid, or huggingface_hub is missing.
    """
    checkpoint = hub.download(str(path)) if str(path).startswith(hub.SCHEME) else _read_file(path, mmap)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("transfer"), dict):
        raise CheckpointError(
            f"{path} was not written by this project's fit. Use a checkpoint from runs/NAME/version_N/checkpoints."
        )
    try:
        validate_schema(checkpoint)
    except CheckpointError as error:
        raise CheckpointError("{path}: {reason}", path=path, reason=error) from error
    return checkpoint


def _read_file(path: str | Path, mmap: bool) -> Any:
    file = require_file(path)
    try:
        with file.open("rb") as opened:
            if opened.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                raise ValueError("no zip file")
        if not mmap:
            verify_checksums(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tensor types that validate_schema refuses
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise damaged_checkpoint(
            f"{path} cannot be loaded as plain tensors: it is damaged or contains code "
            f"({type(error).__name__}: {reason})."
        ) from error


def verify_checksums(file: Path) -> None:
    """Compare the tensors and the other entries of a checkpoint with their checksums, which ``torch.load`` ignores.

    Args:
        file: The zip file that ``torch.save`` has written.

    Raises:
        zipfile.BadZipFile: An entry is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def require_file(path: str | Path) -> Path:
    """The file of a checkpoint.

    Raises:
        CheckpointError: It does not exist.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise CheckpointError(f"{path} is a folder. Pass a checkpoint, such as {path}/checkpoints/best.ckpt of a run.")
    if not file.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. A fit writes them to runs/NAME/version_N/checkpoints.")
    return file


def validate_schema(checkpoint: Any) -> None:
    """Check that a checkpoint has all required entries, each of the right type.

    Raises:
        CheckpointError: An entry is missing or has another type; the message names it.
    """
    mismatch = _mismatch(checkpoint, SCHEMA)
    if mismatch:
        raise damaged_checkpoint(f"The checkpoint is damaged or from another version: {mismatch}.")
    require_tensors(checkpoint["state_dict"], "state_dict")


def require_tensors(tensors: Mapping[Any, Any], place: str) -> None:
    """Check that all values are dense tensors.

    Raises:
        CheckpointError: One is not.
    """
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type == "meta":
            raise damaged_checkpoint(f"The checkpoint is damaged: {name!r} in its {place} is not a dense tensor.")


def hyper_parameters(
    checkpoint: Mapping[str, Any], path: str | Path, model_class: type, **class_arguments: type
) -> dict[str, Any]:
    """The constructor arguments of a checkpoint's model, in plain types.

    Args:
        checkpoint: From :func:`read_checkpoint`.
        path: The checkpoint's file, for the message.
        model_class: Class of the model; its constructor's annotations give the expected types.
        class_arguments: Arguments that name a class, each with the required base class.

    Raises:
        CheckpointError: An argument is unknown, has another type, or names a class that may not be imported.
    """
    arguments = dict(checkpoint["hyper_parameters"])
    if arguments.get("scheduler") is not None:
        arguments.setdefault("scheduler_interval", "epoch")  # earlier versions stepped every scheduler once an epoch
    if arguments["trainable"] != "head":
        arguments.setdefault("batch_norm", "train")  # as in earlier versions
    hints = {name: hint for name, hint in typing.get_type_hints(model_class.__init__).items() if name != "return"}  # type: ignore[misc]
    for name in arguments.keys() - hints.keys():
        raise damaged_checkpoint(f"{path} is damaged or from another version: unknown hyperparameter {name!r}.")
    for name, value in arguments.items():
        if name not in class_arguments and not _is_instance(value, hints[name]):
            raise damaged_checkpoint(f"{path}: model.{name} cannot be {abbreviate(value)}.")
        if name in class_arguments and not (value is None and type(None) in typing.get_args(hints[name])):
            try:
                if not isinstance(value, dict) or _names_classes(value.get("init_args")):
                    raise ConfigError(f"it cannot be {abbreviate(value)}.")
                ClassSpec.from_dict(value).resolve(class_arguments[name])
            except ConfigError as error:
                raise CheckpointError(f"{path}: model.{name}: {error}") from error
    if (arguments.get("image_size") or 0) > MAX_IMAGE_SIZE:
        raise damaged_checkpoint(f"{path}: model.image_size {arguments['image_size']} exceeds {MAX_IMAGE_SIZE}.")
    return arguments


def _mismatch(value: Any, schema: Any, place: str = "") -> str | None:
    """Describe the first difference between a value and a schema; ``None`` if there is none."""
    if isinstance(schema, tuple):
        expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in schema)
        matches = isinstance(value, schema) and not isinstance(value, bool)
        return None if matches else f"{place} is of type {type(value).__name__}, not {expected}"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{place} is of type {type(value).__name__}, not list"
        return next(filter(None, (_mismatch(item, schema[0], f"an item of {place}") for item in value)), None)
    if not isinstance(value, dict):
        return f"{place} is of type {type(value).__name__}, not dict"
    for key, inner in schema.items():
        name = f"{place}.{key}".lstrip(".")
        mismatch = _mismatch(value[key], inner, name) if key in value else f"{name} is missing"
        if mismatch:
            return mismatch
    return None


def _is_instance(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type: a scalar, a list or dict of them, or a union of these."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_instance(value, member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_is_instance(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) is dict:
        key_hint, value_hint = typing.get_args(hint)
        return isinstance(value, dict) and all(
            _is_instance(key, key_hint) and _is_instance(item, value_hint) for key, item in value.items()
        )
    kinds: Callable[..., Any] | tuple[type, ...] = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))  # type: ignore[arg-type]


def _names_classes(value: Any) -> bool:
    """Whether a value contains a ``class_path``: fit never writes one here, but the parser would instantiate it."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_classes, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_classes, value))
