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


def interval_of(hparams: Mapping[str, Any]) -> Interval:
    """How often the scheduler is stepped.

    Args:
        hparams: Hyperparameters with ``scheduler`` as ``{"class_path": ..., "init_args": {...}}``, and optionally
            ``scheduler_interval``, the user's choice.
    """
    requested: Interval | None = hparams.get("scheduler_interval")
    return requested or ("step" if ClassSpec.from_dict(hparams["scheduler"]).name in PER_STEP else "epoch")


def with_length(hparams: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    """Set the schedule's length to that of the fit, unless it is given.

    Args:
        hparams: See :func:`interval_of`; the scheduler may be ``None``.
        length: Length of the fit in units of the interval; ``None`` if unknown.

    Returns:
        The hyperparameters with the length argument of the scheduler set.

    Raises:
        ConfigError: The length is required but unknown, invalid, or differs from that of the fit.
    """
    spec = None if hparams["scheduler"] is None else ClassSpec.from_dict(hparams["scheduler"])
    key = None if spec is None else LENGTH_ARGUMENT.get(spec.name)
    if spec is None or key is None:
        return dict(hparams)
    arguments = {name: value for name, value in spec.init_args.items() if not (name == key and value is None)}
    if arguments.get("epochs") and arguments.get("steps_per_epoch") and key not in arguments:  # OneCycleLR's other form
        arguments[key] = arguments["epochs"] * arguments["steps_per_epoch"]
    if key not in arguments:
        if length is None:
            raise ConfigError(
                f"model.scheduler: {spec.name} needs {key}, because the length of the fit is unknown. "
                f"Set --model.scheduler.{key} or --trainer.max_epochs."
            )
        return {**hparams, "scheduler": ClassSpec(spec.class_path, {**arguments, key: length}).as_dict()}
    if not (isinstance(arguments[key], int) and arguments[key] > 0):
        raise ConfigError(f"model.scheduler: {key} of {spec.name} must be at least 1, not {arguments[key]!r}.")
    if spec.name == "OneCycleLR" and length is not None and arguments[key] != length:
        raise ConfigError(
            f"model.scheduler: OneCycleLR has total_steps {arguments[key]}, but the fit has {length} "
            f"{interval_of(hparams)}s. Remove total_steps or change --trainer.max_epochs."
        )
    return dict(hparams)
