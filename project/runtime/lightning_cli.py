"""LightningCLI with public names for its private hooks, and verbs that are plain functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping
from inspect import cleandoc
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn

#: Source of a verb's flags and help: a function, or a class and the name of its method.
Verb = Callable[..., Any] | tuple[type, str]


class VerbCLI(LightningCLI, ABC):
    """LightningCLI whose verbs can be any function, and whose subclass decides how ``--ckpt_path`` is applied.

    Relies on the order in which LightningCLI calls ``_add_subcommands()``, ``_parse_ckpt_path()`` and
    ``_run_subcommand()``, and on ``_subcommand_parsers``.
    """

    @abstractmethod
    def verbs(self) -> Mapping[str, Verb]:
        """Function or method of each verb; :meth:`subcommands` lists the arguments that are not flags."""

    def describe(self, verb: str) -> str:
        """One-line description of a verb."""
        source = self.verbs()[verb]
        function = getattr(*source) if isinstance(source, tuple) else source
        return cleandoc(function.__doc__ or "").partition("\n")[0]

    def requested_verb(self) -> str | None:
        """The verb whose parser is built; ``None`` builds all of them, at 0.1 s each."""
        return None

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        """Add flags that the signature of the verb's function cannot express."""

    def apply_checkpoint(self) -> None:
        """Apply ``--ckpt_path`` to the parsed configuration. Lightning lets the checkpoint override flags."""

    @abstractmethod
    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        """Run a verb.

        Args:
            verb: Its name.
            flags: Values of the flags that come from its function.
        """

    def verb_parser(self, verb: str) -> LightningArgumentParser:
        """The parser of a verb."""
        return self._subcommand_parsers[verb]

    def instantiate_model(self, model_class: type, links: Any, *args: Any, **kwargs: Any) -> Any:
        """Instantiate the model as Lightning does, with the hyperparameters of the configuration in plain types.

        For an instantiator that changes arguments; it has to change the configuration too. Relies on
        ``_InstantiatorFn``, which reads the configuration when it is first called.

        Args:
            model_class: Class of the model.
            links: The instantiator's argument ``applied_instantiation_links``, which jsonargparse passes by that name.
            args: Arguments of the model.
            kwargs: Arguments of the model.
        """
        instantiate = _InstantiatorFn(cli=self, key="model")
        return instantiate(model_class, *args, applied_instantiation_links=links, **kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        subcommands = parser.add_subcommands()
        self._function_flags: dict[str, list[str]] = {}
        for name, verb in self.verbs().items():
            description = self.describe(name)
            verb_parser = self.init_parser(description=description, **kwargs.get(name, {}))
            self._subcommand_parsers[name] = verb_parser
            subcommands.add_subcommand(name, verb_parser, help=description)
            if self.requested_verb() not in (name, None):
                continue
            self.add_default_arguments_to_parser(verb_parser)
            self.add_core_arguments_to_parser(verb_parser)
            self.add_arguments_to_parser(verb_parser)
            skip: set[str | int] = {*self.subcommands()[name]}
            if isinstance(verb, tuple):
                self._function_flags[name] = verb_parser.add_method_arguments(*verb, skip=skip)
            else:
                self._function_flags[name] = verb_parser.add_function_arguments(verb, skip=skip)
            self.add_verb_arguments(name, verb_parser)

    def _parse_ckpt_path(self) -> None:
        self.apply_checkpoint()

    def _run_subcommand(self, subcommand: str) -> None:
        # A subclass may not instantiate the classes.
        section = getattr(self, "config_init", self.config)[subcommand]
        self.run_verb(subcommand, {name: section[name] for name in self._function_flags[subcommand]})


def option_names(parser: ArgumentParser) -> list[str]:
    """Option names of a parser, such as ``trainer.max_epochs``. Relies on ``ArgumentParser._actions``."""
    return [action.dest for action in parser._actions if action.dest != "help"]


class OptionHelp(NamedTuple):
    """Help of a command-line option.

    Attributes:
        name: Name without dashes, such as ``trainer.max_epochs``.
        help: Description from the docstring.
        default: Default value as text; empty for ``None``.
    """

    name: str
    help: str
    default: str


def option_helps(parser: ArgumentParser) -> list[OptionHelp]:
    """Help of all options of a parser, in order. Relies on ``ArgumentParser._actions``."""
    helps = []
    for action in parser._actions:
        default, is_hidden = action.default, action.help in (None, SUPPRESS) or action.dest == "help"
        if isinstance(default, Mapping):  # a class with its arguments
            default = str(default.get("class_path", "")).rpartition(".")[2]
        if not is_hidden and action.option_strings:
            helps.append(OptionHelp(action.dest, str(action.help), "" if default is None else str(default)))
    return helps
