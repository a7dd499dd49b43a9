"""How often a learning-rate schedule is stepped, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from project.config.class_path import ClassSpec
from project.errors import ConfigError

Interval = Literal["epoch", "step"]
#: Schedules that are made for a step of the optimizer; the others are stepped once an epoch.
PER_STEP = ("OneCycleLR", "CyclicLR")
#: The argument that says over how many steps a schedule goes: the fit's own length unless it is given.
LENGTH = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}


def interval_of(scheduler: Mapping[str, Any], asked: Interval | None) -> Interval:
    """How often a schedule is stepped.

    Args:
        scheduler: ``{"class_path": ..., "init_args": {...}}``.
        asked: What the user has asked for, if anything.
    """
    return asked or ("step" if ClassSpec.from_dict(scheduler).name in PER_STEP else "epoch")


def with_length(scheduler: Mapping[str, Any], length: int | None, interval: Interval) -> dict[str, Any]:
    """A schedule with the length of the fit, where it has none of its own.

    Args:
        scheduler: ``{"class_path": ..., "init_args": {...}}``.
        length: Epochs or steps of the whole fit; ``None`` where that is not known.
        interval: Which of these.

    Returns:
        The same with the argument filled in.

    Raises:
        ConfigError: The length is needed and not known, or is another one than the schedule's.
    """
    spec = ClassSpec.from_dict(scheduler)
    key = LENGTH.get(spec.name)
    given = {name: value for name, value in spec.init_args.items() if not (name == key and value is None)}
    if key is None:
        return spec.as_dict()
    if given.get("epochs") and given.get("steps_per_epoch") and key not in given:  # OneCycleLR's other way to say it
        given[key] = given["epochs"] * given["steps_per_epoch"]
    if key not in given:
        if length is None:
            raise ConfigError(
                f"model.scheduler: {spec.name} needs {key}, as the fit's length is not known. "
                f"Give --model.scheduler.{key} or --trainer.max_epochs."
            )
        return ClassSpec(spec.class_path, {**given, key: length}).as_dict()
    if not (isinstance(given[key], int) and given[key] > 0):
        raise ConfigError(f"model.scheduler: {spec.name} needs a {key} of at least 1, not {given[key]!r}.")
    if spec.name == "OneCycleLR" and length is not None and given[key] != length:
        raise ConfigError(
            f"model.scheduler: OneCycleLR has total_steps {given[key]}, and the fit has {length} {interval}s. "
            "Leave total_steps out, or change --trainer.max_epochs."
        )
    return spec.as_dict()
