"""The optimizer and the schedule of a resumed fit whose arguments have changed.

What the checkpoint holds is never edited argument by argument. The optimizer and the schedule are constructed as the
model now asks for them, the schedule is stepped to where the fit is, and the checkpoint's state is what these objects
say, with the moments that the earlier optimizer has collected. So each argument takes effect, or is refused by name.
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
from project.models.schedules import Interval, interval_of
from project.runtime.console import print_rank_zero

#: Makes the optimizer and the scheduler that some hyper-parameters ask for.
Construct = Callable[[Mapping[str, Any]], tuple[Optimizer, LRScheduler | None]]
#: Arguments that count only when an optimizer takes its first step.
FIRST_STEP = {"Rprop": ("lr",), "Adagrad": ("initial_accumulator_value",)}
MOST_STEPS = 10**7  # of a schedule that is stepped anew: some twenty seconds
#: What a schedule that watches a metric has found so far; all else of its state is an argument.
WATCHED = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


def apply_changes(
    checkpoint: dict[str, Any],
    kept: Mapping[str, Any],
    asked: Mapping[str, Any],
    construct: Construct,
    position: Mapping[Interval, int],
) -> None:
    """Let an optimizer and a schedule that were asked for anew replace those of a checkpoint.

    Nothing is touched where they are the checkpoint's own.

    Args:
        checkpoint: Changed in place: its ``optimizer_states`` and ``lr_schedulers``.
        kept: Its hyper-parameters; ``optimizer`` and ``scheduler`` are ``{"class_path": ..., "init_args": {...}}``, the
            scheduler may be ``None``.
        asked: The model's hyper-parameters.
        construct: Makes both, over parameters without memory.
        position: How many epochs and steps of the optimizer the fit is through.

    Raises:
        ConfigError: An argument cannot be changed any more.
    """
    states, schedules = checkpoint.get("optimizer_states"), checkpoint.get("lr_schedulers")
    if not states:
        return
    same_optimizer = _class(kept["optimizer"]) == _class(asked["optimizer"])
    same_schedule = _class(kept["scheduler"]) == _class(asked["scheduler"])
    if same_schedule and asked["scheduler"] is not None:
        same_schedule = _interval(kept) == _interval(asked)
    optimizer, schedule = construct(asked)
    rate_changed = changed = True
    if same_optimizer:
        before, now = (construct({**each, "scheduler": None})[0] for each in (kept, asked))
        differing = _differing(before.param_groups, now.param_groups)
        _refuse_first_step(_name(asked["optimizer"]), differing)
        rate_changed, changed = "lr" in differing, bool(differing)
    if same_optimizer and same_schedule and not changed and not _reschedules(kept, asked, construct):
        return
    if not same_optimizer:
        print_rank_zero(
            f"Optimizer: {_name(asked['optimizer'])} replaces the checkpoint's {_name(kept['optimizer'])} and starts "
            "without its state."
        )
    saved = states[0]["param_groups"]
    if isinstance(schedule, ReduceLROnPlateau) and same_schedule and schedules:
        found = schedules[0]
        checkpoint["lr_schedulers"] = [
            {**schedule.state_dict(), **{key: found[key] for key in WATCHED if key in found}}
        ]
        if not rate_changed:  # what it has lowered stays lowered
            _take_rates(optimizer.param_groups, saved)
    elif schedule is None:
        checkpoint["lr_schedulers"] = []
    else:
        _advance(optimizer, schedule, position[_interval(asked)])
        checkpoint["lr_schedulers"] = [dict(schedule.state_dict())]
    fresh = optimizer.state_dict()
    if same_optimizer:
        by_name = {group.get("name"): group for group in fresh["param_groups"]}
        for place, group in enumerate(saved):
            own = by_name.get(group.get("name"), fresh["param_groups"][min(place, len(by_name) - 1)])
            group.update({key: value for key, value in own.items() if key not in ("params", "name")})
        _complete(states[0], saved, optimizer)
    else:
        checkpoint["optimizer_states"] = [fresh]


def validate_schedule(schedule: LRScheduler | None) -> None:
    """Take a step of a schedule, before a fit does: torch accepts arguments that fail there, such as ``step_size 0``.

    Args:
        schedule: Over parameters without memory; it is of no use afterwards.

    Raises:
        ConfigError: It cannot be stepped.
    """
    if schedule is None or isinstance(schedule, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of steps of a schedule before any of the optimizer
        try:
            schedule.step()
        except Exception as error:  # what a class makes of arguments that are not for it can be anything
            name = type(schedule).__name__
            raise ConfigError(f"model.scheduler: {name} cannot be stepped ({error}). Check its arguments.") from error


def _name(spec: Mapping[str, Any] | None) -> str:
    return ClassSpec.from_dict(spec).name if spec is not None else ""


def _class(spec: Mapping[str, Any] | None) -> Any:
    """The class itself, as it may have several paths; its path where it cannot be imported."""
    if spec is None:
        return None
    try:
        found: Any = ClassSpec.from_dict(spec).resolve(object)
    except ConfigError:
        return spec["class_path"]
    return found.func


def _interval(hparams: Mapping[str, Any]) -> Interval:
    return interval_of(hparams["scheduler"], hparams.get("scheduler_interval"))


def _reschedules(kept: Mapping[str, Any], asked: Mapping[str, Any], construct: Construct) -> bool:
    """Whether a schedule of the same class has other arguments."""
    if asked["scheduler"] is None:
        return False
    then, now = (construct({**asked, "scheduler": each["scheduler"]}) for each in (kept, asked))
    states = [_plain(schedule.state_dict()) for _, schedule in (then, now) if schedule is not None]
    return states[0] != states[-1] or bool(_differing(then[0].param_groups, now[0].param_groups))


def _differing(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
    """The settings in which groups differ."""
    names = {group.get("name"): group for group in before}
    found: set[str] = set()
    for place, group in enumerate(now):
        other = names.get(group.get("name"), before[min(place, len(before) - 1)])
        settings = group.keys() - {"params", "name"}
        found |= {key for key in settings if _plain(other.get(key)) != _plain(group[key])}
    return found


def _plain(value: Any) -> Any:
    """With lists for tuples, as a config file has no others."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _refuse_first_step(name: str, differing: set[str]) -> None:
    late = sorted(differing.intersection(FIRST_STEP.get(name, ())))
    if late:
        raise ConfigError(
            f"model.optimizer.{late[0]} of {name} counts in the first step alone, so a resumed fit cannot change it. "
            "Leave it out, or start a new fit."
        )


def _take_rates(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    names = {group.get("name"): group for group in saved}
    for place, group in enumerate(groups):
        group["lr"] = names.get(group.get("name"), saved[min(place, len(saved) - 1)])["lr"]


def _advance(optimizer: Optimizer, schedule: LRScheduler, steps: int) -> None:
    """Step a new schedule to where the fit is.

    Raises:
        ConfigError: It does not reach so far.
        CheckpointError: The fit cannot have had so many steps.
    """
    if steps > MOST_STEPS:
        raise damaged_checkpoint(f"The checkpoint is damaged: it says that the fit has had {steps} steps.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of steps of a schedule before any of the optimizer
        for step in range(steps):
            try:
                if isinstance(schedule, ReduceLROnPlateau):  # it begins anew: nothing is known of its metric
                    return
                schedule.step()
            except (ValueError, ArithmeticError) as error:
                raise ConfigError(
                    f"model.scheduler: {type(schedule).__name__} ends at step {step}, and the fit is at step {steps} "
                    f"({error}). Give it more steps, or leave its arguments out."
                ) from error


def _complete(state: dict[str, Any], saved: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    """Add the moments that a changed argument asks for, such as those of ``amsgrad``; they start at zero.

    Args:
        state: Of the checkpoint's optimizer, changed in place.
        saved: Its groups.
        optimizer: Made anew, over parameters without memory, which takes a step to show what it collects.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # not every optimizer can step here; validate_states reports what it cannot resume from
        return
    for old, own in zip(saved, optimizer.param_groups, strict=False):
        for number, parameter in zip(old["params"], own["params"], strict=False):
            moments = state["state"].get(number)
            for key, value in optimizer.state[parameter].items() if isinstance(moments, dict) else ():
                if key not in moments and isinstance(value, torch.Tensor):
                    moments[key] = torch.zeros(value.shape, dtype=value.dtype)
