"""Optimizer and scheduler arguments that change when a fit is resumed.

The optimizer and the scheduler are constructed with the new arguments, and the scheduler is stepped to the fit's
position. Their state replaces the checkpoint's, except for the optimizer's moments. So each changed argument takes
effect, or is refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.config.class_path import ClassSpec
from project.errors import ConfigError, damaged_checkpoint
from project.models.parameter_groups import NO_DECAY
from project.models.schedules import Interval, frequency_of, interval_of
from project.runtime.console import print_rank_zero

#: Constructs the optimizer and the scheduler of hyperparameters.
Construct = Callable[[Mapping[str, Any]], tuple[Optimizer, LRScheduler | None]]
#: Arguments that are used only in an optimizer's first step.
FIRST_STEP = {"Rprop": ("lr",), "Adagrad": ("initial_accumulator_value",)}
MAX_STEPS = 10**7  # to advance a scheduler by: about twenty seconds
#: Keys of ReduceLROnPlateau's state that are not arguments.
PLATEAU_PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


def apply_changes(
    checkpoint: dict[str, Any],
    saved: Mapping[str, Any],
    requested: Mapping[str, Any],
    construct: Construct,
    position: Mapping[Interval, int],
) -> None:
    """Apply changed optimizer and scheduler arguments to a checkpoint; without a change, do nothing.

    Args:
        checkpoint: Its ``optimizer_states`` and ``lr_schedulers`` are changed in place.
        saved: The checkpoint's hyperparameters: ``optimizer`` and ``scheduler``, each as
            ``{"class_path": ..., "init_args": {...}}``, ``scheduler_interval`` and ``scheduler_frequency``; the
            scheduler may be ``None``.
        requested: The model's hyperparameters.
        construct: Constructs both over parameters on the meta device.
        position: Number of completed epochs and optimizer steps.

    Raises:
        ConfigError: A changed argument cannot take effect in a resumed fit.
    """
    states, schedulers = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    if not states:
        return
    same_optimizer = _class(saved["optimizer"]) == _class(requested["optimizer"])
    same_scheduler = _class(saved["scheduler"]) == _class(requested["scheduler"])
    if same_scheduler and requested["scheduler"] is not None:
        steps_of = [(interval_of(hparams), frequency_of(hparams)) for hparams in (saved, requested)]
        same_scheduler = steps_of[0] == steps_of[1]
    optimizer, scheduler = construct(requested)
    lr_changed = optimizer_changed = True
    changed: set[str] = set()
    if same_optimizer:
        before, after = (construct({**hparams, "scheduler": None})[0] for hparams in (saved, requested))
        changed = _changed_settings(before.param_groups, after.param_groups)
        _refuse_first_step_arguments(_name(requested["optimizer"]), changed)
        lr_changed, optimizer_changed = "lr" in changed, bool(changed)
    if same_scheduler and not optimizer_changed and not _scheduler_changed(saved, requested, construct):
        return
    if not same_optimizer:
        print_rank_zero(
            f"Optimizer: {_name(requested['optimizer'])} replaces the checkpoint's {_name(saved['optimizer'])} and "
            "starts without its state."
        )
    saved_groups = states[0]["param_groups"]
    if isinstance(scheduler, ReduceLROnPlateau) and same_scheduler and schedulers:
        progress = {key: schedulers[0][key] for key in PLATEAU_PROGRESS if key in schedulers[0]}
        checkpoint["lr_schedulers"] = [{**scheduler.state_dict(), **progress}]
        if not lr_changed:  # keep the reductions so far
            for group, saved_group in _matched(optimizer.param_groups, saved_groups):
                group["lr"] = saved_group["lr"]
    elif scheduler is None:
        checkpoint["lr_schedulers"] = []
    else:
        _advance(scheduler, position[interval_of(requested)] // frequency_of(requested))
        checkpoint["lr_schedulers"] = [dict(scheduler.state_dict())]
    fresh = optimizer.state_dict()
    if same_optimizer:
        # Earlier versions decayed all parameters of a stage, and a fit continues as it started.
        kept = {"params", "name", "weight_decay"} - (changed & {"weight_decay"})
        for saved_group, group in _matched(saved_groups, fresh["param_groups"]):
            saved_group.update({key: value for key, value in group.items() if key not in kept})
        _add_missing_moments(states[0], saved_groups, optimizer)
    else:
        checkpoint["optimizer_states"] = [fresh]


def validate_scheduler(scheduler: LRScheduler | None) -> None:
    """Check that a scheduler can be stepped: torch accepts arguments such as ``step_size 0`` that fail only then.

    Args:
        scheduler: A disposable one, over parameters on the meta device.

    Raises:
        ConfigError: Stepping the scheduler fails.
    """
    if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if the scheduler is stepped before the optimizer
        try:
            scheduler.step()
        except Exception as error:  # any class of scheduler may raise anything
            name = type(scheduler).__name__
            raise ConfigError(f"model.scheduler: {name} cannot be stepped ({error}). Check its arguments.") from error


def _name(spec: Mapping[str, Any] | None) -> str:
    return ClassSpec.from_dict(spec).name if spec is not None else ""


def _class(spec: Mapping[str, Any] | None) -> Any:
    """The class, which may have several import paths; its path if it cannot be imported."""
    if spec is None:
        return None
    try:
        bound: Any = ClassSpec.from_dict(spec).resolve(object)
    except ConfigError:
        return spec["class_path"]
    return bound.func


def _scheduler_changed(saved: Mapping[str, Any], requested: Mapping[str, Any], construct: Construct) -> bool:
    """Whether the arguments of a scheduler of the same class differ."""
    if requested["scheduler"] is None:
        return False
    before, after = (construct({**requested, "scheduler": hparams["scheduler"]}) for hparams in (saved, requested))
    states = [_tuples_to_lists(scheduler.state_dict()) for _, scheduler in (before, after) if scheduler is not None]
    return states[0] != states[-1] or bool(_changed_settings(before[0].param_groups, after[0].param_groups))


def _changed_settings(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the settings in which parameter groups differ."""
    return {
        key
        for group, other in _matched(after, before)
        for key in group.keys() - {"params", "name"}
        if _tuples_to_lists(other.get(key)) != _tuples_to_lists(group[key])
    }


def _matched(groups: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pair each parameter group with one of the others: of its name, of its stage, or else of its index."""
    by_name = {str(group.get("name")): group for group in others}
    by_stage = {name.removesuffix(NO_DECAY): group for name, group in by_name.items()} | by_name
    pairs = []
    for index, group in enumerate(groups):
        name = str(group.get("name"))
        fallback = by_stage.get(name.removesuffix(NO_DECAY), others[min(index, len(others) - 1)])
        pairs.append((group, by_name.get(name, fallback)))
    return pairs


def _tuples_to_lists(value: Any) -> Any:
    """Convert tuples to lists, as config files have only lists."""
    if isinstance(value, Mapping):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _refuse_first_step_arguments(name: str, changed: set[str]) -> None:
    late = sorted(changed.intersection(FIRST_STEP.get(name, ())))
    if late:
        raise ConfigError(
            f"model.optimizer.{late[0]} of {name} is used only in the first step, so a resumed fit cannot change it.\n"
            "Omit it, or start a new fit."
        )


def _advance(scheduler: LRScheduler, steps: int) -> None:
    """Step a new scheduler to the fit's position.

    Raises:
        ConfigError: The scheduler ends before it.
        CheckpointError: The number of steps is implausible.
    """
    if steps > MAX_STEPS:
        raise damaged_checkpoint(f"The checkpoint is damaged: its number of steps cannot be {steps}.")
    if isinstance(scheduler, ReduceLROnPlateau):  # it starts anew, because earlier values of its metric are unknown
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if the scheduler is stepped before the optimizer
        for step in range(steps):
            try:
                scheduler.step()
            except (ValueError, ArithmeticError) as error:
                raise ConfigError(
                    f"model.scheduler: {type(scheduler).__name__} ends at step {step}, but the fit is at step {steps} "
                    f"({error}).\nIncrease its number of steps, or omit its arguments."
                ) from error


def _add_missing_moments(
    state: dict[str, Any], saved_groups: Sequence[Mapping[str, Any]], optimizer: Optimizer
) -> None:
    """Add the moments that a changed argument requires, such as those of ``amsgrad``, as zeros.

    Args:
        state: State of the checkpoint's optimizer, changed in place.
        saved_groups: Its parameter groups.
        optimizer: The new optimizer, over parameters on the meta device; a step shows which moments it has.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # some optimizers cannot step on the meta device; validate_states reports an incomplete state
        return
    for saved_group, group in zip(saved_groups, optimizer.param_groups, strict=False):
        for number, parameter in zip(saved_group["params"], group["params"], strict=False):
            moments = state["state"].get(number)
            for key, value in optimizer.state[parameter].items() if isinstance(moments, dict) else ():
                if key not in moments and isinstance(value, torch.Tensor):
                    moments[key] = torch.zeros(value.shape, dtype=value.dtype)
