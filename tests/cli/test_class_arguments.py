"""A class that replaces another one has its own defaults and what the user gave for it; however it is given."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from project.classifier import ImageClassifier
from project.cli.checkpoint_defaults import validate_order
from project.cli.main import main
from project.cli.transfer_cli import TransferCLI
from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.optimizers import ArticleSGD
from project.runtime.signals import SignalHandler
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

#: What an optimizer is given here. LBFGS takes one group and needs a closure; its arguments are its own all the same.
OPTIMIZERS = sorted(
    name
    for name, kind in vars(optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind not in (Optimizer, optim.SparseAdam)  # refused
)
#: Arguments without which a scheduler cannot be made; those of the others come from files that hold no objects.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ConstantLR": {},
    "CosineAnnealingLR": {"T_max": 7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.1, "cycle_momentum": False},
    "ExponentialLR": {"gamma": 0.5},
    "LinearLR": {},
    "MultiStepLR": {"milestones": [2, 5]},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "PolynomialLR": {},
    "ReduceLROnPlateau": {},
    "StepLR": {"step_size": 3},
}
#: They are made of functions or of other schedulers.
NOT_PLAIN = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
Made = tuple[Optimizer, LRScheduler | None]


class Parsed(TransferCLI):
    """A command line that makes and runs nothing."""

    def instantiate_classes(self) -> None:
        pass

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def groups() -> list[dict[str, Any]]:
    return [{"name": "head", "params": [nn.Parameter(torch.zeros(2, 2))]}]


def parsed(line: list[str]) -> Made:
    """What the classifier of a command line makes."""
    model = Parsed(line, SignalHandler(), "").config.fit.model
    optimizer = ClassSpec.from_dict(model.optimizer.as_dict()).construct("model.optimizer", Optimizer, groups())
    if model.scheduler is None:
        return optimizer, None
    return optimizer, ClassSpec.from_dict(model.scheduler.as_dict()).construct("", LRScheduler, optimizer)


def settings(made: Made) -> tuple[type, list[dict[str, Any]], type, dict[str, Any]]:
    """All that the user's arguments decide: settings of the groups, and the state of the schedule."""
    optimizer, scheduler = made
    of_groups = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k not in ("params", "name")}
        for group in optimizer.param_groups
    ]
    state = dict(scheduler.state_dict()) if scheduler is not None else {}
    return type(optimizer), of_groups, type(scheduler), {k: v for k, v in state.items() if "fn" not in k}


@pytest.fixture
def made(here: Path, photos: Path, trained: Path) -> Callable[..., list[Made]]:
    """What flags, a file, Python and a resumed fit make of an optimizer and a scheduler."""

    def make(**parts: tuple[type, Mapping[str, Any]]) -> list[Made]:
        flags: list[str] = []
        for part, (kind, given) in parts.items():
            # The whole path: Lightning and timm have classes of some of these names, too.
            flags += [f"--model.{part}", f"{kind.__module__}.{kind.__name__}"]
            flags += [
                f"--model.{part}.{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
                for key, value in given.items()
            ]
        config = {
            part: {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(given)}
            for part, (kind, given) in parts.items()
        }
        (here / "parts.yaml").write_text(yaml.safe_dump({"model": config}))
        other = "SGD" if parts["optimizer"][0] is not optim.SGD else "RMSprop"
        # What a file before it says of another class does not count.
        before = {
            "optimizer": {"class_path": f"torch.optim.{other}", "init_args": {"lr": 9.0, "weight_decay": 8.0}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
        }
        if "scheduler" in parts and parts["scheduler"][0] is not lr_scheduler.StepLR:
            (here / "before.yaml").write_text(yaml.safe_dump({"model": before}))
        else:
            (here / "before.yaml").write_text(yaml.safe_dump({"model": {"optimizer": before["optimizer"]}}))
        data = ["--data.root", str(photos)]
        fresh = ["fit", *SMALL, "--model.weights", "null", *data]
        lines = [
            [*fresh, *flags],
            [*fresh, "-c", "parts.yaml"],
            [*fresh, "-c", "before.yaml", *flags],
            ["fit", "--ckpt_path", str(trained / "checkpoints/last.ckpt"), *data, *flags],
        ]
        found = [parsed(line) for line in lines]
        python = {part: functools.partial(kind, **given) for part, (kind, given) in parts.items()}
        found.append(ImageClassifier("shufflenet_v2_x0_5", None, classes=["a"], **python).make_optimizer(groups()))
        return found

    return make


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_its_own_defaults(name: str, made: Callable[..., list[Made]]) -> None:
    kind = getattr(optim, name)
    wanted = settings((kind(groups()), None))
    for found in made(optimizer=(kind, {})):
        if name == "AdamW" and found[0].defaults["lr"] == 0.01:
            continue  # the checkpoint has this class, so its learning rate stays
        assert settings(found) == wanted


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_what_the_user_gave_and_no_more(name: str, made: Callable[..., list[Made]]) -> None:
    kind = getattr(optim, name)
    wanted = settings((kind(groups(), lr=0.0625), None))
    assert [settings(found) for found in made(optimizer=(kind, {"lr": 0.0625}))] == 5 * [wanted]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_has_what_the_user_gave_and_no_more(name: str, made: Callable[..., list[Made]]) -> None:
    kind, given = getattr(lr_scheduler, name), SCHEDULERS[name]
    optimizer = optim.SGD(groups(), lr=0.5)
    wanted = settings((optimizer, kind(optimizer, **given)))
    for found in made(optimizer=(optim.SGD, {"lr": 0.5}), scheduler=(kind, given)):
        ours = settings(found)
        assert ours[:2] == wanted[:2]
        assert ours[3] == wanted[3]


def test_every_scheduler_of_torch_is_tried() -> None:
    public = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
    }
    assert public == SCHEDULERS.keys() | NOT_PLAIN


def test_the_default_is_the_articles_recipe(here: Path, photos: Path) -> None:
    small = ["fit", *SMALL, "--model.weights", "null", "--data.root", str(photos)]
    for flags, rate in (([], 0.001), (["--model.optimizer.lr", "0.5"], 0.5)):
        optimizer, _ = parsed([*small, *flags])
        assert type(optimizer) is ArticleSGD
        (group,) = optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (rate, 0.9, 0)
    (group,) = ImageClassifier("resnet18", None, classes=["a"]).make_optimizer(groups())[0].param_groups
    assert (group["lr"], group["momentum"]) == (0.001, 0.9)


def test_an_argument_before_its_class_is_refused(here: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = ["--model.optimizer.lr", "0.1", "--model.optimizer", "AdamW"]
    assert main(["fit", *SMALL, "--data.root", str(photos), *early]) == 2
    assert "--model.optimizer.lr comes before --model.optimizer, which starts" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Put it after"):
        validate_order(["--model.optimizer.lr=1", "--model.optimizer.class_path", "AdamW"])
    validate_order(["fit", "--data.root", "x", "--data.rooted=x", "--model.optimizer=AdamW", "--model.optimizer.lr=1"])
    with pytest.raises(ConfigError, match="Put it after"):
        validate_order(["--data.source.root=x", "--data.source=torchvision.datasets.EuroSAT"])


def test_a_fit_trains_with_them(fit: Callable[..., int]) -> None:
    assert fit("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.0625") == 0
    checkpoint = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (0.0625, 0.01)


def test_flags_beat_config_files_wherever_they_stand(here: Path, photos: Path) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"class_path": "torch.optim.AdamW"}}}))
    for where in (["--model.optimizer.lr", "0.4", "-c", "c.yaml"], ["--config=c.yaml", "--model.optimizer.lr", "0.4"]):
        optimizer, _ = parsed(["fit", *SMALL, "--model.weights", "null", "--data.root", str(photos), *where])
        assert type(optimizer) is optim.AdamW and optimizer.param_groups[0]["lr"] == 0.4
