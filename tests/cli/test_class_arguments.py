"""Arguments of optimizers and schedulers, given by flags, config files, Python and checkpoints."""

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
from project.cli.argument_order import validate_order
from project.cli.main import main
from project.cli.transfer_cli import TransferCLI
from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.optimizers import ArticleSGD
from project.models.parameter_groups import stage_groups
from project.runtime.signals import SignalHandler
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

#: All optimizers of torch; SparseAdam is refused.
OPTIMIZERS = sorted(
    name
    for name, kind in vars(optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind not in (Optimizer, optim.SparseAdam)
)
#: Required arguments of the schedulers with plain arguments.
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
#: Schedulers whose arguments are functions or other schedulers.
NOT_PLAIN = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
Instances = tuple[Optimizer, LRScheduler | None]


class ParseOnlyCLI(TransferCLI):
    """Command line that only parses."""

    def instantiate_classes(self) -> None:
        pass

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parameter_groups() -> list[dict[str, Any]]:
    return [{"name": "head", "params": [nn.Parameter(torch.zeros(2, 2))]}]


def head_groups() -> list[dict[str, Any]]:
    """The same parameters as :func:`parameter_groups`, as the classifier passes them."""
    return stage_groups({"head": nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 2))})})


def instantiate(args: list[str]) -> Instances:
    """Optimizer and scheduler of a command line."""
    model = ParseOnlyCLI(args, SignalHandler(), "").config.fit.model
    spec = ClassSpec.from_dict(model.optimizer.as_dict())
    optimizer = spec.construct("model.optimizer", Optimizer, parameter_groups())
    if model.scheduler is None:
        return optimizer, None
    return optimizer, ClassSpec.from_dict(model.scheduler.as_dict()).construct("", LRScheduler, optimizer)


def settings(instances: Instances) -> tuple[type, list[dict[str, Any]], type, dict[str, Any]]:
    """Everything that user arguments determine: parameter group options and scheduler state."""
    optimizer, scheduler = instances
    groups = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k not in ("params", "name")}
        for group in optimizer.param_groups
    ]
    state = dict(scheduler.state_dict()) if scheduler is not None else {}
    return type(optimizer), groups, type(scheduler), {k: v for k, v in state.items() if "fn" not in k}


@pytest.fixture
def instantiate_all(here: Path, photos: Path, trained: Path) -> Callable[..., list[Instances]]:
    """Instantiates from flags, a config, a config that flags override, a checkpoint with flags, and Python."""

    def instantiate_each(**classes: tuple[type, Mapping[str, Any]]) -> list[Instances]:
        flags: list[str] = []
        for key, (kind, arguments) in classes.items():
            # The full path: Lightning and timm have classes with the same names.
            flags += [f"--model.{key}", f"{kind.__module__}.{kind.__name__}"]
            flags += [
                f"--model.{key}.{name}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"
                for name, value in arguments.items()
            ]
        config = {
            key: {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(arguments)}
            for key, (kind, arguments) in classes.items()
        }
        (here / "config.yaml").write_text(yaml.safe_dump({"model": config}))
        other = "SGD" if classes["optimizer"][0] is not optim.SGD else "RMSprop"
        # The arguments of other classes in an earlier config must not leak into the new ones.
        overridden = {
            "optimizer": {"class_path": f"torch.optim.{other}", "init_args": {"lr": 9.0, "weight_decay": 8.0}},
        }
        if "scheduler" in classes and classes["scheduler"][0] is not lr_scheduler.StepLR:
            step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}
            overridden["scheduler"] = step_lr
        (here / "overridden.yaml").write_text(yaml.safe_dump({"model": overridden}))
        data = ["--data.root", str(photos)]
        fit = ["fit", *SMALL, "--model.weights", "null", *data]
        command_lines = [
            [*fit, *flags],
            [*fit, "-c", "config.yaml"],
            [*fit, "-c", "overridden.yaml", *flags],
            ["fit", "--ckpt_path", str(trained / "checkpoints/last.ckpt"), *data, *flags],
        ]
        partials = {key: functools.partial(kind, **arguments) for key, (kind, arguments) in classes.items()}
        model = ImageClassifier("shufflenet_v2_x0_5", None, classes=["a"], **partials)
        return [*map(instantiate, command_lines), model.make_optimizer(head_groups())]

    return instantiate_each


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_uses_its_own_defaults(name: str, instantiate_all: Callable[..., list[Instances]]) -> None:
    kind = getattr(optim, name)
    expected = settings((kind(parameter_groups()), None))
    for instances in instantiate_all(optimizer=(kind, {})):
        if name == "AdamW" and instances[0].defaults["lr"] == 0.01:
            continue  # the checkpoint's optimizer is AdamW too, so its learning rate is kept
        assert settings(instances) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_uses_only_the_given_arguments(name: str, instantiate_all: Callable[..., list[Instances]]) -> None:
    kind = getattr(optim, name)
    expected = settings((kind(parameter_groups(), lr=0.0625), None))
    assert [*map(settings, instantiate_all(optimizer=(kind, {"lr": 0.0625})))] == 5 * [expected]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_uses_only_the_given_arguments(name: str, instantiate_all: Callable[..., list[Instances]]) -> None:
    kind, arguments = getattr(lr_scheduler, name), SCHEDULERS[name]
    optimizer = optim.SGD(parameter_groups(), lr=0.5)
    expected = settings((optimizer, kind(optimizer, **arguments)))
    for instances in instantiate_all(optimizer=(optim.SGD, {"lr": 0.5}), scheduler=(kind, arguments)):
        actual = settings(instances)
        assert actual[:2] == expected[:2]
        assert actual[3] == expected[3]


def test_every_scheduler_of_torch_is_covered() -> None:
    public = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
    }
    assert public == SCHEDULERS.keys() | NOT_PLAIN


def test_default_optimizer_is_that_of_the_article(here: Path, photos: Path) -> None:
    small = ["fit", *SMALL, "--model.weights", "null", "--data.root", str(photos)]
    for flags, rate in (([], 0.001), (["--model.optimizer.lr", "0.5"], 0.5)):
        optimizer, _ = instantiate([*small, *flags])
        assert type(optimizer) is ArticleSGD
        (group,) = optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (rate, 0.9, 0)
    (group,) = ImageClassifier("resnet18", None, classes=["a"]).make_optimizer(head_groups())[0].param_groups
    assert (group["lr"], group["momentum"]) == (0.001, 0.9)


def test_argument_before_its_class_is_refused(here: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = ["--model.optimizer.lr", "0.1", "--model.optimizer", "AdamW"]
    assert main(["fit", *SMALL, "--data.root", str(photos), *early]) == 2
    assert "--model.optimizer.lr comes before --model.optimizer, which starts" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Put it after"):
        validate_order(["--model.optimizer.lr=1", "--model.optimizer.class_path", "AdamW"])
    validate_order(["fit", "--data.root", "x", "--data.rooted=x", "--model.optimizer=AdamW", "--model.optimizer.lr=1"])
    with pytest.raises(ConfigError, match="Put it after"):
        validate_order(["--data.source.root=x", "--data.source=torchvision.datasets.EuroSAT"])


def test_group_flag_that_overrides_an_earlier_flag_is_refused(
    here: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    optimizer = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.4"]
    group = '{"optimizer": {"class_path": "torch.optim.SGD"}}'
    message = refused(main(["fit", *SMALL, "--data.root", str(photos), *optimizer, "--model", group]))
    assert "--model.optimizer comes before --model, which overrides it. Put it after." in message
    (here / "model.yaml").write_text("optimizer: {class_path: torch.optim.SGD}")
    with pytest.raises(ConfigError, match="which overrides it"):
        validate_order([*optimizer, "--model=model.yaml"])
    with pytest.raises(ConfigError, match=r"--trainer\.callbacks\+ comes before --trainer, which overrides it"):
        validate_order(["--trainer.callbacks+=Timer", "--trainer", '{"callbacks": null}'])


def test_group_flag_is_merged_with_flags_of_other_keys(here: Path, photos: Path) -> None:
    fit = ["fit", *SMALL, "--model.weights", "null", "--data.root", str(photos)]
    flags = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.4"]
    for args in (
        [*fit, *flags, "--model", '{"label_smoothing": 0.1}'],
        [*fit, "--model", '{"optimizer": {"class_path": "torch.optim.SGD"}}', *flags],
    ):
        optimizer, _ = instantiate(args)
        assert type(optimizer) is optim.AdamW and optimizer.param_groups[0]["lr"] == 0.4


def test_fit_trains_with_the_optimizer_of_the_flags(fit: Callable[..., int]) -> None:
    assert fit("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.0625") == 0
    checkpoint = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.0625, 0.01), (0.0625, 0)]


def test_flags_override_config_files_in_any_order(here: Path, photos: Path) -> None:
    (here / "c.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"class_path": "torch.optim.AdamW"}}}))
    for flags in (["--model.optimizer.lr", "0.4", "-c", "c.yaml"], ["--config=c.yaml", "--model.optimizer.lr", "0.4"]):
        optimizer, _ = instantiate(["fit", *SMALL, "--model.weights", "null", "--data.root", str(photos), *flags])
        assert type(optimizer) is optim.AdamW and optimizer.param_groups[0]["lr"] == 0.4
