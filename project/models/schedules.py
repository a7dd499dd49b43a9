"""Learning-rate schedules: warm-up and cosine, and the interval, frequency and length of any schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.config.class_path import ClassSpec
from project.errors import ConfigError

Interval = Literal["epoch", "step"]
#: Schedulers that are designed to be stepped after every optimizer step; the others are stepped once an epoch.
PER_STEP = ("OneCycleLR", "CyclicLR", "WarmupCosine")
#: Argument that sets a schedule's length; it defaults to the length of the fit.
LENGTH_ARGUMENT = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "WarmupCosine": "total_steps"}
#: Schedulers that are valid for the whole fit only: another length than that of the fit is an error.
WHOLE_FIT = ("OneCycleLR", "WarmupCosine")
#: Arguments that have one value for all parameter groups, or a list with the value of each.
PER_GROUP = ("max_lr", "base_lr", "min_lr", "base_momentum", "max_momentum", "min_momentum")
#: Those that replace the optimizer's learning rate.
RATES = {"OneCycleLR": ("max_lr",), "CyclicLR": ("max_lr", "base_lr")}


class WarmupCosine(LRScheduler):
    """Linear warm-up to the learning rate (Goyal et al., arXiv:1706.02677), then a cosine (arXiv:1608.03983).

    It multiplies the learning rate of each parameter group by the same factor, which depends only on the step.

    Args:
        optimizer: The optimizer.
        total_steps: Number of steps of the fit.
        warmup: Length of the warm-up: a fraction of the steps if below 1, else a number of steps.
        final: Factor at the end, in [0, 1].
        last_epoch: Number of the last step; -1 to start.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.1,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= final <= 1:
            raise ConfigError(f"final of WarmupCosine must be in [0, 1], not {final}.")
        if not (0 <= warmup < 1 or (1 <= warmup <= total_steps and warmup == int(warmup))):
            raise ConfigError(
                f"warmup of WarmupCosine must be a fraction below 1, or a number of steps up to {total_steps} (the "
                f"length of the fit), not {warmup}."
            )
        self.total_steps, self.final = total_steps, final
        self.warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """Learning rate of each group: the product of its initial rate and :meth:`factor`."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def factor(self, step: int) -> float:
        """Factor of the learning rate in a step, counted from 0."""
        if step < self.warmup_steps:
            return warm_up_factor(step, self.warmup_steps)
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


def warm_up_factor(step: int, steps: int) -> float:
    """Factor of the learning rate in a linear warm-up: above 0 in step 0, and 1 from step ``steps`` on."""
    return min(1.0, (step + 1) / (steps + 1))


def interval_of(hparams: Mapping[str, Any]) -> Interval:
    """How often the scheduler is stepped.

    Args:
        hparams: Hyperparameters with ``scheduler`` as ``{"class_path": ..., "init_args": {...}}``, and optionally
            ``scheduler_interval``, the user's choice.
    """
    requested: Interval | None = hparams.get("scheduler_interval")
    return requested or ("step" if ClassSpec.from_dict(hparams["scheduler"]).name in PER_STEP else "epoch")


def frequency_of(hparams: Mapping[str, Any]) -> int:
    """Number of intervals between two steps of the scheduler.

    Args:
        hparams: See :func:`interval_of`, with ``scheduler_frequency``; earlier versions had none.
    """
    return int(hparams.get("scheduler_frequency", 1))


def validate_steps(hparams: Mapping[str, Any]) -> None:
    """Check the interval and frequency at which the scheduler is stepped.

    Args:
        hparams: See :func:`frequency_of`; the scheduler may be ``None``.

    Raises:
        ConfigError: The frequency is out of range or has no effect, or the scheduler follows the validations.
    """
    frequency = hparams["scheduler_frequency"]
    if frequency < 1:
        raise ConfigError(f"model.scheduler_frequency must be at least 1, not {frequency}.")
    if hparams["scheduler"] is None:
        if frequency != 1:
            raise ConfigError(
                "model.scheduler_frequency has no effect without a scheduler. Remove it, or set model.scheduler."
            )
    elif ClassSpec.from_dict(hparams["scheduler"]).name == "ReduceLROnPlateau":
        if frequency != 1:
            raise ConfigError(
                "model.scheduler_frequency: ReduceLROnPlateau is stepped at each validation. Remove it, or set "
                "--trainer.check_val_every_n_epoch."
            )
        if hparams["scheduler_interval"] == "step":
            raise ConfigError(
                "model.scheduler_interval step: ReduceLROnPlateau is stepped once per epoch. Remove it, or use epoch."
            )


def for_groups(scheduler: ClassSpec, depths: Sequence[int], lr_decay: float) -> ClassSpec:
    """Give a scheduler's arguments a value for each parameter group.

    A list has a value per stage, and a stage may have two groups. A single value that replaces the learning rates is
    multiplied by the factor of each depth.

    Args:
        scheduler: Its class and arguments.
        depths: Depth of each group, see :func:`project.models.parameter_groups.arrange_groups`.
        lr_decay: Factor of the learning rate per stage.

    Returns:
        The scheduler with new arguments.
    """
    rates, stages = RATES.get(scheduler.name, ()) if lr_decay != 1 else (), max(depths) + 1
    arguments = dict(scheduler.init_args)
    for name in PER_GROUP:
        value = arguments.get(name)
        if isinstance(value, list) and len(value) == stages:
            arguments[name] = [value[stages - 1 - depth] for depth in depths]
        elif name in rates and isinstance(value, (int, float)):
            arguments[name] = [value * lr_decay**depth for depth in depths]
    return ClassSpec(scheduler.class_path, arguments)


def with_length(hparams: Mapping[str, Any], length: int | None) -> dict[str, Any]:
    """Set the schedule's length to that of the fit, unless it is given.

    Args:
        hparams: See :func:`interval_of`; the scheduler may be ``None``.
        length: Length of the fit in steps of the scheduler; ``None`` if unknown.

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
    if spec.name in WHOLE_FIT and length is not None and arguments[key] != length:
        steps = f"{interval_of(hparams)}s" if frequency_of(hparams) == 1 else "steps of the scheduler"
        raise ConfigError(
            f"model.scheduler: {spec.name} has {key} {arguments[key]}, but the fit has {length} {steps}. "
            f"Remove {key} or change --trainer.max_epochs."
        )
    return dict(hparams)
