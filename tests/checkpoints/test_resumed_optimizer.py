"""A resumed fit whose optimizer or schedule has other arguments: each takes effect, or is refused by name."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.checkpoints.restore import construct_optimizer
from project.checkpoints.resume_checks import on_meta, validate_states
from project.checkpoints.resumed_optimizer import apply_changes
from project.errors import CheckpointError, ConfigError

Spec = tuple[str, dict[str, Any]]
EPOCHS = 8  # of a whole fit
STEPS = 3  # of the optimizer in an epoch


class Fit:
    """A fit of two layers, one group each, that is trained on fixed gradients."""

    def __init__(self, optimizer: Spec, scheduler: Spec | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [nn.Parameter(torch.rand(4, 4, generator=generator)) for _ in range(2)]
        self.groups = [
            {"name": name, "params": [layer]} for name, layer in zip(("layer4", "head"), self.layers, strict=True)
        ]
        self.hparams = {"optimizer": spec(optimizer), "scheduler": spec(scheduler), "scheduler_interval": "epoch"}
        self.optimizer, self.scheduler = construct_optimizer(self.hparams, self.groups)
        self.rates: list[float] = []

    def train(self, epochs: int) -> "Fit":
        for _ in range(epochs):
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(100 * len(self.rates) + step)
                for layer in self.layers:
                    layer.grad = torch.rand(4, 4, generator=generator) - 0.5
                self.optimizer.step()
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(1.0)  # no better than before, ever
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
        """Take a checkpoint, as Lightning does after the project has looked at it."""
        groups = on_meta(self.groups)
        kept, position = checkpoint["hyper_parameters"], {"epoch": epochs, "step": epochs * STEPS}
        apply_changes(
            checkpoint, kept, self.hparams, lambda asked: construct_optimizer(asked, on_meta(groups)), position
        )
        validate_states(checkpoint, groups, functools.partial(construct_optimizer, self.hparams))
        for state in checkpoint["optimizer_states"]:
            self.optimizer.load_state_dict(state)
        for state in checkpoint["lr_schedulers"]:
            assert self.scheduler is not None
            self.scheduler.load_state_dict(state)
        self.rates = [float("nan")] * min(epochs, 99)
        return self


def spec(part: Spec | None) -> dict[str, Any] | None:
    if part is None:
        return None
    where = "lr_scheduler." if part[0].endswith(("LR", "Plateau", "Restarts")) else ""
    return {"class_path": f"torch.optim.{where}{part[0]}", "init_args": part[1]}


def rates(optimizer: Spec, scheduler: Spec | None) -> list[float]:
    """The learning rate of each epoch of a fit that never stopped."""
    return Fit(optimizer, scheduler).train(EPOCHS).rates


#: LBFGS needs a closure, SparseAdam gradients that are sparse.
OPTIMIZERS = sorted(
    {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} - {"Optimizer", "LBFGS", "SparseAdam"}
)
SGD: Spec = ("SGD", {"lr": 0.5})
STEP: Spec = ("StepLR", {"step_size": 2, "gamma": 0.5})
#: The scheduler before, and the one that is asked for.
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
    "one where there was none": (None, STEP),
    "none any more": (STEP, None),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_schedule_goes_on_as_if_it_had_been_asked_for_from_the_start(name: str, epochs: int) -> None:
    before, now = SCHEDULES[name]
    checkpoint = Fit(SGD, before).train(epochs).checkpoint()
    resumed = Fit(SGD, now).resume(checkpoint, epochs).train(EPOCHS - epochs)
    assert resumed.rates[epochs:] == pytest.approx(rates(SGD, now)[epochs:])


@pytest.mark.parametrize("scheduler", [None, STEP, ("CosineAnnealingLR", {"T_max": 8})], ids=["none", "step", "cosine"])
def test_a_learning_rate_that_is_changed_halfway_is_that_of_the_whole_schedule(scheduler: Spec | None) -> None:
    checkpoint = Fit(SGD, scheduler).train(4).checkpoint()
    other: Spec = ("SGD", {"lr": 0.125})
    resumed = Fit(other, scheduler).resume(checkpoint, 4).train(4)
    assert resumed.rates[4:] == pytest.approx(rates(other, scheduler)[4:])


def test_a_plateau_keeps_what_it_has_seen_and_takes_its_arguments() -> None:
    before: Spec = ("ReduceLROnPlateau", {"patience": 1, "factor": 0.5})
    fit = Fit(SGD, before).train(4)
    assert fit.optimizer.param_groups[0]["lr"] == 0.25
    now: Spec = ("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "min_lr": 0.2})
    resumed = Fit(SGD, now).resume(fit.checkpoint(), 4)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.25 and resumed.scheduler is not None
    assert resumed.scheduler.state_dict()["best"] == 1.0
    assert resumed.train(4).rates[4:] == [0.25, 0.25, 0.2, 0.2] or min(resumed.rates[4:]) == 0.2


def test_a_list_of_a_file_is_the_tuple_of_a_flag() -> None:
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
def test_without_a_change_nothing_is_touched(optimizer: Spec, scheduler: Spec | None) -> None:
    fit = Fit(optimizer, scheduler).train(4)
    whole = Fit(optimizer, scheduler).train(EPOCHS)
    resumed = Fit(optimizer, scheduler)
    resumed.layers[0].data.copy_(fit.layers[0]), resumed.layers[1].data.copy_(fit.layers[1])
    checkpoint = fit.checkpoint()
    resumed.resume(checkpoint, 4)
    assert str(checkpoint) == str(fit.checkpoint())
    resumed.train(4)
    assert all(torch.equal(a, b) for a, b in zip(resumed.layers, whole.layers, strict=True))


#: Optimizer, what it has, and what is asked for.
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
    ("name", "had", "asked"), CHANGES, ids=[f"{name} {had}, {asked}" for name, had, asked in CHANGES]
)
def test_each_argument_of_an_optimizer_takes_effect(name: str, had: dict[str, Any], asked: dict[str, Any]) -> None:
    base = Fit((name, {"lr": 0.01, **had})).train(4)

    def resumed(arguments: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        fit = Fit((name, {"lr": 0.01, **arguments}))
        for layer, trained in zip(fit.layers, base.layers, strict=True):
            layer.data.copy_(trained)
        fit.resume(base.checkpoint(), 4)
        for key, value in asked.items() if arguments is asked else ():
            assert {str(group[key]) for group in fit.optimizer.param_groups} == {str(value)}
        return fit.train(2).layers

    assert not any(torch.equal(a, b) for a, b in zip(resumed(had), resumed(asked), strict=True))


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("Rprop", "lr", 0.5), ("Adagrad", "initial_accumulator_value", 1.0)]
)
def test_what_counts_in_the_first_step_alone_is_refused(name: str, argument: str, value: float) -> None:
    checkpoint = Fit((name, {"lr": 0.01})).train(1).checkpoint()
    with pytest.raises(ConfigError, match=f"model.optimizer.{argument} of {name} counts in the first step alone"):
        Fit((name, {"lr": 0.01, argument: value})).resume(checkpoint, 1)


def test_another_optimizer_starts_without_a_state_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Fit(("SGD", {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.9}), STEP).train(4).checkpoint()
    resumed = Fit(("AdamW", {"lr": 0.25}), STEP).resume(checkpoint, 4)
    assert "AdamW replaces the checkpoint's SGD and starts without its state" in capsys.readouterr().out
    assert not resumed.optimizer.state
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert resumed.train(4).rates[4:] == [0.0625, 0.0625, 0.03125, 0.03125]


def test_a_schedule_that_is_too_short_is_refused() -> None:
    checkpoint = Fit(SGD, ("OneCycleLR", {"max_lr": 0.1, "total_steps": 8})).train(4).checkpoint()
    with pytest.raises(ConfigError, match="OneCycleLR ends at step 3, and the fit is at step 4"):
        Fit(SGD, ("OneCycleLR", {"max_lr": 0.1, "total_steps": 3})).resume(checkpoint, 4)


def test_groups_are_matched_by_their_names() -> None:
    """A later version may have them in another order."""

    def construct(asked: Mapping[str, Any]) -> tuple[Optimizer, LRScheduler | None]:
        rate = asked["optimizer"]["init_args"]["lr"]
        groups = [{"name": name, "params": [nn.Parameter(torch.zeros(1))], "lr": lr} for name, lr in rate.items()]
        return torch.optim.SGD(groups), None

    def hparams(rate: dict[str, float]) -> dict[str, Any]:
        return {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": rate}}, "scheduler": None}

    kept = hparams({"layer4": 0.01, "head": 0.1})
    checkpoint = {"hyper_parameters": kept, "optimizer_states": [construct(kept)[0].state_dict()], "lr_schedulers": []}
    apply_changes(checkpoint, kept, hparams({"head": 1.0, "layer4": 0.2}), construct, {"epoch": 0, "step": 0})
    states: Any = checkpoint["optimizer_states"]
    assert {group["name"]: group["lr"] for group in states[0]["param_groups"]} == {"head": 1.0, "layer4": 0.2}


def test_a_schedule_that_is_stepped_otherwise_is_stepped_to_where_the_fit_is() -> None:
    fit = Fit(SGD, STEP).train(4)
    resumed = Fit(SGD, STEP)
    resumed.hparams["scheduler_interval"] = "step"
    resumed.resume(fit.checkpoint(), 4)
    assert resumed.scheduler is not None and resumed.scheduler.last_epoch == 4 * STEPS


def test_optimizers_of_one_name_are_different_classes() -> None:
    timm = pytest.importorskip("timm.optim", reason="needs timm")
    assert timm.Adafactor is not torch.optim.Adafactor
    fit = Fit(("Adafactor", {"lr": 0.01})).train(2)
    resumed = Fit(("Adafactor", {"lr": 0.01}))
    resumed.hparams["optimizer"] = {"class_path": "timm.optim.Adafactor", "init_args": {"lr": 0.01}}
    resumed.optimizer, _ = construct_optimizer(resumed.hparams, resumed.groups)
    resumed.resume(fit.checkpoint(), 2)
    assert not resumed.optimizer.state


def test_a_count_of_steps_that_cannot_be_is_refused() -> None:
    fit = Fit(SGD, STEP).train(1)
    with pytest.raises(CheckpointError, match="says that the fit has had 1000000000000 steps"):
        Fit(("SGD", {"lr": 0.1}), STEP).resume(fit.checkpoint(), 10**12)
