"""Changing optimizer or scheduler arguments on resume: each change takes effect or is refused by name."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.checkpoints.resume_checks import copy_groups, validate_states
from project.checkpoints.resumed_optimizer import apply_changes
from project.errors import CheckpointError, ConfigError
from project.models.optimizers import construct_optimizer
from project.models.schedules import Interval

Spec = tuple[str, dict[str, Any]]
EPOCHS = 8  # of an uninterrupted fit
STEPS = 3  # optimizer steps per epoch


class Fit:
    """A fit of two layers, one parameter group each, with fixed gradients."""

    def __init__(self, optimizer: Spec, scheduler: Spec | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [nn.Parameter(torch.rand(4, 4, generator=generator)) for _ in range(2)]
        self.groups = [
            {"name": name, "params": [layer], "decayed": [True]}
            for name, layer in zip(("layer4", "head"), self.layers, strict=True)
        ]
        self.hparams = {"optimizer": spec(optimizer), "scheduler": spec(scheduler), "scheduler_interval": "epoch"}
        self.optimizer, self.scheduler = construct_optimizer(self.hparams, self.groups)
        self.learning_rates: list[float] = []

    def train(self, epochs: int) -> "Fit":
        for _ in range(epochs):
            self.learning_rates.append(self.optimizer.param_groups[0]["lr"])
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(100 * len(self.learning_rates) + step)
                for layer in self.layers:
                    layer.grad = torch.rand(4, 4, generator=generator) - 0.5
                self.optimizer.step()
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(1.0)  # never improves
            elif self.scheduler is not None:
                self.scheduler.step()
        return self

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "hyper_parameters": self.hparams,
                "optimizer_states": [self.optimizer.state_dict()],
                "lr_schedulers": [self.scheduler.state_dict()] if self.scheduler is not None else [],
            }
        )

    def resume(self, checkpoint: dict[str, Any], epochs: int) -> "Fit":
        """Restore a checkpoint as Lightning does, after the project's checks and changes."""
        groups = copy_groups(self.groups)
        saved = checkpoint["hyper_parameters"]
        position: dict[Interval, int] = {"epoch": epochs, "step": epochs * STEPS}
        apply_changes(
            checkpoint, saved, self.hparams, lambda hparams: construct_optimizer(hparams, copy_groups(groups)), position
        )
        validate_states(checkpoint, groups, functools.partial(construct_optimizer, self.hparams))
        for state in checkpoint["optimizer_states"]:
            self.optimizer.load_state_dict(state)
        for state in checkpoint["lr_schedulers"]:
            assert self.scheduler is not None
            self.scheduler.load_state_dict(state)
        self.learning_rates = [float("nan")] * min(epochs, 99)
        return self


def spec(part: Spec | None) -> dict[str, Any] | None:
    if part is None:
        return None
    module = "lr_scheduler." if part[0].endswith(("LR", "Plateau", "Restarts")) else ""
    return {"class_path": f"torch.optim.{module}{part[0]}", "init_args": part[1]}


def uninterrupted_rates(optimizer: Spec, scheduler: Spec | None) -> list[float]:
    """Learning rate of each epoch of an uninterrupted fit."""
    return Fit(optimizer, scheduler).train(EPOCHS).learning_rates


#: LBFGS needs a closure, SparseAdam sparse gradients.
OPTIMIZERS = sorted(
    {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer", "LBFGS", "SparseAdam"}
)
SGD: Spec = ("SGD", {"lr": 0.5})
STEP: Spec = ("StepLR", {"step_size": 2, "gamma": 0.5})
#: The scheduler before the resume, and the one after it.
SCHEDULES: dict[str, tuple[Spec | None, Spec | None]] = {
    "milestones": (("MultiStepLR", {"milestones": [2, 6]}), ("MultiStepLR", {"milestones": [3, 4, 5]})),
    "gamma": (("ExponentialLR", {"gamma": 0.9}), ("ExponentialLR", {"gamma": 0.5})),
    "step_size": (STEP, ("StepLR", {"step_size": 3, "gamma": 0.5})),
    "T_max": (("CosineAnnealingLR", {"T_max": 8}), ("CosineAnnealingLR", {"T_max": 16})),
    "max_lr of one cycle": (
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 8}),
        ("OneCycleLR", {"max_lr": 0.3, "total_steps": 8}),
    ),
    "max_lr of cycles": (
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.9, "step_size_up": 2}),
    ),
    "power": (("PolynomialLR", {"total_iters": 8}), ("PolynomialLR", {"total_iters": 8, "power": 2.0})),
    "T_0": (("CosineAnnealingWarmRestarts", {"T_0": 2}), ("CosineAnnealingWarmRestarts", {"T_0": 5})),
    "start_factor": (("LinearLR", {}), ("LinearLR", {"start_factor": 0.1})),
    "factor": (("ConstantLR", {}), ("ConstantLR", {"factor": 0.1})),
    "another class": (STEP, ("ExponentialLR", {"gamma": 0.5})),
    "added": (None, STEP),
    "removed": (STEP, None),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 4])
def test_changed_scheduler_continues_as_if_used_from_the_start(name: str, epochs: int) -> None:
    before, after = SCHEDULES[name]
    checkpoint = Fit(SGD, before).train(epochs).checkpoint()
    resumed = Fit(SGD, after).resume(checkpoint, epochs).train(EPOCHS - epochs)
    assert resumed.learning_rates[epochs:] == pytest.approx(uninterrupted_rates(SGD, after)[epochs:])


@pytest.mark.parametrize("scheduler", [None, STEP, ("CosineAnnealingLR", {"T_max": 8})], ids=["none", "step", "cosine"])
def test_changed_learning_rate_rescales_the_rest_of_the_schedule(scheduler: Spec | None) -> None:
    checkpoint = Fit(SGD, scheduler).train(4).checkpoint()
    other: Spec = ("SGD", {"lr": 0.125})
    resumed = Fit(other, scheduler).resume(checkpoint, 4).train(4)
    assert resumed.learning_rates[4:] == pytest.approx(uninterrupted_rates(other, scheduler)[4:])


def test_plateau_scheduler_keeps_its_progress_and_accepts_new_arguments() -> None:
    before: Spec = ("ReduceLROnPlateau", {"patience": 1, "factor": 0.5})
    fit = Fit(SGD, before).train(4)
    assert fit.optimizer.param_groups[0]["lr"] == 0.25
    after: Spec = ("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "min_lr": 0.2})
    resumed = Fit(SGD, after).resume(fit.checkpoint(), 4)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.25 and resumed.scheduler is not None
    assert resumed.scheduler.state_dict()["best"] == 1.0
    assert resumed.train(4).learning_rates[4:] == [0.25, 0.25, 0.2, 0.2] or min(resumed.learning_rates[4:]) == 0.2


def test_list_from_a_config_file_equals_tuple_from_a_flag() -> None:
    checkpoint = Fit(("AdamW", {"lr": 0.01, "betas": [0.9, 0.99]}), STEP).train(1).checkpoint()
    before = copy.deepcopy(checkpoint)
    Fit(("AdamW", {"lr": 0.01, "betas": (0.9, 0.99)}), STEP).resume(checkpoint, 1)
    assert str(checkpoint) == str(before)


@pytest.mark.parametrize("scheduler", [None, STEP], ids=["none", "step"])
@pytest.mark.parametrize(
    "optimizer",
    [SGD, *((name, {"lr": 0.01}) for name in OPTIMIZERS)],
    ids=lambda spec: spec[0],
)
def test_unchanged_arguments_leave_the_checkpoint_unchanged(optimizer: Spec, scheduler: Spec | None) -> None:
    fit = Fit(optimizer, scheduler).train(4)
    uninterrupted = Fit(optimizer, scheduler).train(EPOCHS)
    resumed = Fit(optimizer, scheduler)
    resumed.layers[0].data.copy_(fit.layers[0]), resumed.layers[1].data.copy_(fit.layers[1])
    checkpoint = fit.checkpoint()
    resumed.resume(checkpoint, 4)
    assert str(checkpoint) == str(fit.checkpoint())
    resumed.train(4)
    assert all(torch.equal(a, b) for a, b in zip(resumed.layers, uninterrupted.layers, strict=True))


#: Optimizer, arguments before the resume, and arguments after it.
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("SGD", {}, {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9}, {}),
    ("SGD", {}, {"weight_decay": 0.1}),
    ("AdamW", {}, {"amsgrad": True}),
    ("Adam", {"amsgrad": True}, {}),
    ("Adam", {}, {"betas": (0.5, 0.9)}),
    ("RMSprop", {}, {"centered": True}),
    ("RMSprop", {}, {"momentum": 0.9}),
    ("RMSprop", {"momentum": 0.5, "centered": True}, {"alpha": 0.9}),
    ("NAdam", {}, {"momentum_decay": 0.1}),
    ("RAdam", {}, {"weight_decay": 0.1}),
    ("Adadelta", {}, {"rho": 0.5}),
    ("Adagrad", {}, {"lr_decay": 0.1}),
    ("Adamax", {}, {"eps": 0.1}),
    ("ASGD", {}, {"lambd": 0.1}),
    ("Rprop", {}, {"etas": (0.1, 2.0)}),
]


@pytest.mark.parametrize(
    ("name", "before", "after"), CHANGES, ids=[f"{name} {before}, {after}" for name, before, after in CHANGES]
)
def test_changed_optimizer_argument_takes_effect(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    base = Fit((name, {"lr": 0.01, **before})).train(4)

    def resumed(arguments: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        fit = Fit((name, {"lr": 0.01, **arguments}))
        for layer, trained in zip(fit.layers, base.layers, strict=True):
            layer.data.copy_(trained)
        fit.resume(base.checkpoint(), 4)
        for key, value in after.items() if arguments is after else ():
            assert {str(group[key]) for group in fit.optimizer.param_groups} == {str(value)}
        return fit.train(2).layers

    assert not any(torch.equal(a, b) for a, b in zip(resumed(before), resumed(after), strict=True))


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("Rprop", "lr", 0.5), ("Adagrad", "initial_accumulator_value", 1.0)]
)
def test_argument_of_the_first_step_cannot_be_changed(name: str, argument: str, value: float) -> None:
    checkpoint = Fit((name, {"lr": 0.01})).train(1).checkpoint()
    with pytest.raises(ConfigError, match=f"model.optimizer.{argument} of {name} is used only in the first step"):
        Fit((name, {"lr": 0.01, argument: value})).resume(checkpoint, 1)


def test_replaced_optimizer_starts_without_state_and_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Fit(("SGD", {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.9}), STEP).train(4).checkpoint()
    resumed = Fit(("AdamW", {"lr": 0.25}), STEP).resume(checkpoint, 4)
    assert "AdamW replaces the checkpoint's SGD and starts without its state" in capsys.readouterr().out
    assert not resumed.optimizer.state
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert resumed.train(4).learning_rates[4:] == [0.0625, 0.0625, 0.03125, 0.03125]


def test_scheduler_that_ends_before_the_resumed_step_is_refused() -> None:
    checkpoint = Fit(SGD, ("OneCycleLR", {"max_lr": 0.1, "total_steps": 8})).train(4).checkpoint()
    with pytest.raises(ConfigError, match="OneCycleLR ends at step 3, but the fit is at step 4"):
        Fit(SGD, ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3})).resume(checkpoint, 4)


def test_parameter_groups_are_matched_by_name() -> None:
    """Their order may change in a later version."""

    def construct(hparams: Mapping[str, Any]) -> tuple[Optimizer, LRScheduler | None]:
        lrs = hparams["optimizer"]["init_args"]["lr"]
        groups = [{"name": name, "params": [nn.Parameter(torch.zeros(1))], "lr": lr} for name, lr in lrs.items()]
        return torch.optim.SGD(groups), None

    def hparams_of(lrs: dict[str, float]) -> dict[str, Any]:
        return {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": lrs}}, "scheduler": None}

    saved = hparams_of({"layer4": 0.01, "head": 0.1})
    state = construct(saved)[0].state_dict()
    checkpoint = {"hyper_parameters": saved, "optimizer_states": [state], "lr_schedulers": []}
    apply_changes(checkpoint, saved, hparams_of({"head": 1.0, "layer4": 0.2}), construct, {"epoch": 0, "step": 0})
    states: Any = checkpoint["optimizer_states"]
    assert {group["name"]: group["lr"] for group in states[0]["param_groups"]} == {"head": 1.0, "layer4": 0.2}


def test_changed_interval_advances_the_scheduler_to_the_fits_step() -> None:
    fit = Fit(SGD, STEP).train(4)
    resumed = Fit(SGD, STEP)
    resumed.hparams["scheduler_interval"] = "step"
    resumed.resume(fit.checkpoint(), 4)
    assert resumed.scheduler is not None and resumed.scheduler.last_epoch == 4 * STEPS


def test_optimizers_of_the_same_name_from_different_packages_are_different() -> None:
    timm = pytest.importorskip("timm.optim", reason="needs timm")
    assert timm.Adafactor is not torch.optim.Adafactor
    fit = Fit(("Adafactor", {"lr": 0.01})).train(2)
    resumed = Fit(("Adafactor", {"lr": 0.01}))
    resumed.hparams["optimizer"] = {"class_path": "timm.optim.Adafactor", "init_args": {"lr": 0.01}}
    resumed.optimizer, _ = construct_optimizer(resumed.hparams, resumed.groups)
    resumed.resume(fit.checkpoint(), 2)
    assert not resumed.optimizer.state


def test_implausible_number_of_steps_is_refused() -> None:
    fit = Fit(SGD, STEP).train(1)
    with pytest.raises(CheckpointError, match="its number of steps cannot be 1000000000000"):
        Fit(("SGD", {"lr": 0.1}), STEP).resume(fit.checkpoint(), 10**12)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_capturable_optimizer_is_refused_on_a_cpu(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} with capturable true needs a GPU"):
        Fit((name, {"lr": 0.01, "capturable": True}))


def test_fused_capturable_optimizer_is_accepted_on_a_cpu() -> None:
    arguments: Spec = ("AdamW", {"lr": 0.01, "capturable": True, "fused": True})
    checkpoint = Fit(arguments).train(1).checkpoint()
    Fit(arguments).resume(checkpoint, 1).train(1)
