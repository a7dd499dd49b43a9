"""Interval and length of learning-rate schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from project.config.class_path import ClassSpec
from project.errors import ConfigError

Interval = Literal["epoch", "step"]
#: Schedulers that are designed to be stepped after every optimizer step; the others are stepped once an epoch.
PER_STEP = ("OneCycleLR", "CyclicLR")
#: Argument that sets a schedule's length; it defaults to the length of the fit.
LENGTH_ARGUMENT = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}


def interval_of(scheduler: Mapping[str, Any], requested: Interval | None) -> Interval:
    """How often a scheduler is stepped.

    Args:
        scheduler: ``{"class_path": ..., "init_args": {...}}``.
        requested: The user's choice, if any.
    """
    return requested or ("step" if ClassSpec.from_dict(scheduler).name in PER_STEP else "epoch")


def with_length(scheduler: Mapping[str, Any], length: int | None, interval: Interval) -> dict[str, Any]:
    """Set a schedule's length to that of the fit, unless it is given.

    Args:
        scheduler: ``{"class_path": ..., "init_args": {...}}``.
        length: Length of the fit in units of ``interval``; ``None`` if unknown.
        interval: Unit of ``length``.

    Returns:
        The scheduler with its length argument set.

    Raises:
        ConfigError: The length is required but unknown, invalid, or differs from that of the fit.
    """
    spec = ClassSpec.from_dict(scheduler)
    key = LENGTH_ARGUMENT.get(spec.name)
    arguments = {name: value for name, value in spec.init_args.items() if not (name == key and value is None)}
    if key is None:
        return spec.as_dict()
    if arguments.get("epochs") and arguments.get("steps_per_epoch") and key not in arguments:  # OneCycleLR's other form
        arguments[key] = arguments["epochs"] * arguments["steps_per_epoch"]
    if key not in arguments:
        if length is None:
            raise ConfigError(
                f"model.scheduler: {spec.name} needs {key}, because the length of the fit is unknown. "
                f"Set --model.scheduler.{key} or --trainer.max_epochs."
            )
        return ClassSpec(spec.class_path, {**arguments, key: length}).as_dict()
    if not (isinstance(arguments[key], int) and arguments[key] > 0):
        raise ConfigError(f"model.scheduler: {key} of {spec.name} must be at least 1, not {arguments[key]!r}.")
    if spec.name == "OneCycleLR" and length is not None and arguments[key] != length:
        raise ConfigError(
            f"model.scheduler: OneCycleLR has total_steps {arguments[key]}, but the fit has {length} {interval}s. "
            "Remove total_steps or change --trainer.max_epochs."
        )
    return spec.as_dict()
