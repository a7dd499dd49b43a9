"""The private hooks of LightningCLI and of its parser, under public names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping
from inspect import cleandoc
from typing import Any, NamedTuple

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

#: What a verb's flags and help come from: a function, or a class and the name of its method.
Verb = Callable[..., Any] | tuple[type, str]


class VerbCLI(LightningCLI, ABC):
    """LightningCLI whose verbs are any functions, and which leaves a checkpoint's arguments to its subclass.

    Relies on when LightningCLI calls ``_add_subcommands()``, ``_parse_ckpt_path()`` and ``_run_subcommand()``, and on
    its reading a verb's parser from ``_subcommand_parsers``.
    """

    @abstractmethod
    def verbs(self) -> Mapping[str, Verb]:
        """What each verb's flags and help come from; :meth:`subcommands` names the arguments that are no flags."""

    def describe(self, verb: str) -> str:
        """What a verb does, in a sentence."""
        found = self.verbs()[verb]
        function = getattr(*found) if isinstance(found, tuple) else found
        return cleandoc(function.__doc__ or "").partition("\n")[0]

    def requested_verb(self) -> str | None:
        """The only verb whose flags are needed; ``None`` for the flags of all. Building a verb's parser takes 0.1 s."""
        return None

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        """Add flags of one verb that its function's signature cannot express."""

    def apply_checkpoint(self) -> None:
        """Apply ``--ckpt_path`` to the parsed configuration; Lightning overrides flags with the checkpoint's values."""

    @abstractmethod
    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        """Run a verb.

        Args:
            verb: Its name.
            flags: The values of its own flags.
        """

    def verb_parser(self, verb: str) -> LightningArgumentParser:
        """The parser of a verb."""
        return self._subcommand_parsers[verb]

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers: dict[str, LightningArgumentParser] = {}
        subcommands = parser.add_subcommands()
        self._own_flags: dict[str, list[str]] = {}
        for name, verb in self.verbs().items():
            description = self.describe(name)
            one = self.init_parser(description=description, **kwargs.get(name, {}))
            self._subcommand_parsers[name] = one
            subcommands.add_subcommand(name, one, help=description)
            if self.requested_verb() not in (name, None):
                continue
            self.add_default_arguments_to_parser(one)
            self.add_core_arguments_to_parser(one)
            self.add_arguments_to_parser(one)
            skip: set[str | int] = {*self.subcommands()[name]}
            if isinstance(verb, tuple):
                self._own_flags[name] = one.add_method_arguments(*verb, skip=skip)
            else:
                self._own_flags[name] = one.add_function_arguments(verb, skip=skip)
            self.add_verb_arguments(name, one)

    def _parse_ckpt_path(self) -> None:
        self.apply_checkpoint()

    def _run_subcommand(self, subcommand: str) -> None:
        section = self.config_init[subcommand]
        self.run_verb(subcommand, {name: section[name] for name in self._own_flags[subcommand]})


def option_names(parser: ArgumentParser) -> list[str]:
    """Names of the options of a parser, such as ``trainer.max_epochs``. Relies on ``ArgumentParser._actions``."""
    return [action.dest for action in parser._actions if action.dest != "help"]


class OptionHelp(NamedTuple):
    """What there is to say of an option.

    Attributes:
        name: Without its dashes, such as ``trainer.max_epochs``.
        help: From the docstring.
        default: As text; empty for none.
    """

    name: str
    help: str
    default: str


def option_helps(parser: ArgumentParser) -> list[OptionHelp]:
    """All options of a parser in their order. Relies on ``ArgumentParser._actions``."""
    found = []
    for action in parser._actions:
        default, suppressed = action.default, action.help in (None, SUPPRESS) or action.dest == "help"
        if isinstance(default, Mapping):  # a class
            default = str(default.get("class_path", "")).rpartition(".")[2]
        if not suppressed and action.option_strings:
            found.append(OptionHelp(action.dest, str(action.help), "" if default is None else str(default)))
    return found
