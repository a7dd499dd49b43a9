"""WarmupCosine, and arguments of schedulers with a value per parameter group."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from project.errors import ConfigError
from project.models.optimizers import construct_optimizer
from project.models.schedules import WarmupCosine

#: Two stages and the head, each with a decayed and another parameter.
GROUPS = [
    {"name": name, "params": [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))], "decayed": [True, False]}
    for name in ("layer3", "layer4", "head")
]


def optimizer(rates: tuple[float, ...] = (1.0,)) -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_of(scheduler: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def test_warmup_is_linear_and_then_follows_a_cosine() -> None:
    rates = [rate for (rate,) in rates_of(WarmupCosine(optimizer(), 10, 0.2, final=0.1), 11)]
    expected = [1 / 3, 2 / 3, *(0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9))]
    assert rates == pytest.approx(expected)
    assert [rate for (rate,) in rates_of(WarmupCosine(optimizer(), 10, 2, final=0.1), 11)] == rates


def test_all_groups_have_the_same_factor() -> None:
    rates = rates_of(WarmupCosine(optimizer((1.0, 0.25)), 10), 10)
    assert all(small == large / 4 for large, small in rates)


def test_schedule_continues_from_any_step() -> None:
    expected = rates_of(WarmupCosine(optimizer((0.5, 0.1)), 9, 3), 9)
    for stop in range(9):
        stopped = WarmupCosine(optimizer((0.5, 0.1)), 9, 3)
        rates_of(stopped, stop)
        resumed = WarmupCosine(optimizer((0.5, 0.1)), 9, 3)
        resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
        resumed.load_state_dict(stopped.state_dict())
        assert rates_of(resumed, 9 - stop) == expected[stop:]


@pytest.mark.parametrize("length", [1, 2])
def test_short_fits_have_a_schedule(length: int) -> None:
    assert rates_of(WarmupCosine(optimizer(), length), length)[0] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": -0.1}, "warmup of WarmupCosine must be a fraction below 1, or a number of steps up to 8"),
        ({"warmup": 1.5}, "not 1.5"),
        ({"warmup": 9}, "up to 8"),
        ({"final": 2}, r"final of WarmupCosine must be in \[0, 1\], not 2"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WarmupCosine(optimizer(), 8, **arguments)


@pytest.mark.parametrize(
    ("max_lr", "expected"),
    [(0.8, [0.2, 0.2, 0.4, 0.4, 0.8, 0.8]), ([0.1, 0.2, 0.3], [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])],
    ids=["one rate, by depth", "a rate per stage"],
)
def test_one_cycle_has_a_rate_per_stage(max_lr: Any, expected: list[float]) -> None:
    scheduler = {"max_lr": max_lr, "total_steps": 4}
    made, _ = construct_optimizer(
        {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": scheduler},
            "lr_decay": 0.5,
        },
        GROUPS,
    )
    assert [group["max_lr"] for group in made.param_groups] == expected
