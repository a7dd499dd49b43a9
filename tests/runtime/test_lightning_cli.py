"""Contract tests of the private hooks of LightningCLI that VerbCLI uses."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringModel

from project.runtime.lightning_cli import Verb, VerbCLI, option_names

CHANGED = f"Lightning {pl.__version__} has changed what project/runtime/lightning_cli.py relies on: "


def greet(name: str, model: Any = None, often: int = 1) -> None:
    """Greet somebody.

    Args:
        name: Name of the person.
        model: Not a flag.
        often: How many times.
    """


class GreetingCLI(VerbCLI):
    def __init__(self, *args: str) -> None:
        self.calls: list[Any] = []
        super().__init__(BoringModel, seed_everything_default=False, auto_configure_optimizers=False, args=[*args])

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**VerbCLI.subcommands(), "greet": {"model"}}

    def verbs(self) -> dict[str, Verb]:
        return {"validate": (pl.Trainer, "validate"), "greet": greet}

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        if verb == "greet":
            parser.add_argument("--loudly", action="store_true")

    def apply_checkpoint(self) -> None:
        self.calls.append(("apply_checkpoint", hasattr(self, "config"), hasattr(self, "model")))

    def before_instantiate_classes(self) -> None:
        self.calls.append("before_instantiate_classes")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        return super().instantiate_trainer(
            **kwargs, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False
        )

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        self.calls.append((verb, flags, type(self.model), type(self.trainer)))


@pytest.fixture(autouse=True)
def _no_program_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program"])


def test_function_verb_receives_its_flags() -> None:
    cli = GreetingCLI("greet", "--name", "Ada", "--loudly", "--trainer.max_epochs", "3")
    assert cli.calls == [
        ("apply_checkpoint", True, False),
        "before_instantiate_classes",
        ("greet", {"name": "Ada", "often": 1}, BoringModel, pl.Trainer),
    ], f"{CHANGED}_add_subcommands(), _parse_ckpt_path() or _run_subcommand()"
    assert cli.config.greet.loudly
    assert cli.trainer.max_epochs == 3


def test_trainer_method_verb_omits_the_skipped_arguments() -> None:
    (_, flags, *_) = GreetingCLI("validate").calls[-1]
    assert flags == {"ckpt_path": None, "verbose": True, "weights_only": None}, f"{CHANGED}Trainer.validate()"


def test_help_comes_from_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    run: Callable[..., Any] = GreetingCLI
    with pytest.raises(SystemExit):
        run("greet", "--help")
    out = capsys.readouterr().out
    assert "Greet somebody." in out
    assert "How many times." in out
    assert "Not a flag" not in out
    with pytest.raises(SystemExit):
        run("--help")
    assert "greet               Greet somebody." in capsys.readouterr().out


def test_each_verb_has_its_own_parser_with_known_options() -> None:
    parser = GreetingCLI("validate").verb_parser("greet")
    assert {"name", "often", "loudly", "trainer.max_epochs", "config"} <= {*option_names(parser)}, (
        f"{CHANGED}LightningCLI._subcommand_parsers or ArgumentParser._actions"
    )
    assert "help" not in option_names(parser)


class ChangedModel(BoringModel):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = width


class ChangingCLI(GreetingCLI):
    """Changes an argument of the model in an instantiator."""

    def __init__(self, *args: str) -> None:
        self.calls = []
        VerbCLI.__init__(self, ChangedModel, seed_everything_default=False, args=[*args])

    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(self.change, ChangedModel, subclasses=False, prepend=True)

    def change(self, model_class: type, *args: Any, applied_instantiation_links: Any, **kwargs: Any) -> Any:
        self.config[self.subcommand].model.width = kwargs["width"] = 5
        return self.instantiate_model(model_class, applied_instantiation_links, *args, **kwargs)


def test_instantiator_changes_the_arguments_and_the_hyperparameters_of_the_model() -> None:
    cli = ChangingCLI("greet", "--name", "you", "--model.width", "3")
    assert (cli.model.width, dict(cli.model.hparams).get("width")) == (5, 5), f"{CHANGED}_InstantiatorFn"
