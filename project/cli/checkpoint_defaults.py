"""What ``--ckpt_path`` does: find the checkpoint, take its arguments as defaults, and go on from it or refuse it."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from project.checkpoints.metadata import epochs_of, seed_of, split_settings
from project.checkpoints.reader import hyper_parameters, read_checkpoint
from project.checkpoints.restore import PARTS
from project.classifier import ImageClassifier
from project.cli.parser_errors import explain, explain_part
from project.cli.run_folders import RUNS, WORDS, newest
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError, ProjectError, damaged_checkpoint, nearest
from project.models.schedules import LENGTH
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.jsonargparse_internals import arguments_of_their_class
from project.runtime.lightning_cli import VerbCLI
from project.trainer import Trainer


class CheckpointCLI(VerbCLI):
    """A command line whose flags and files beat what a checkpoint says.

    Args:
        args: Command line, without the program's name.
        options: Of LightningCLI.
    """

    trainer: Trainer

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        self._args = list(args)
        self._checkpoint: dict[str, Any] | None = None
        super().__init__(ImageClassifier, ImageDataModule, args=self._args, **options)

    def requested_verb(self) -> str | None:
        """The verb, where it comes first."""
        return self._args[0] if self._args and self._args[0] in self.subcommands() else None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and put a mistake into words.

        Raises:
            ConfigError: A flag or key is unknown, or its value is not of its kind.
        """
        validate_order(args)
        verb = next((word for word in args if word in self.subcommands()), None)
        path, _ = split_checkpoint_flag(args)
        if verb and path and path not in WORDS and self._checkpoint is None and "--help" not in args:
            self._take_defaults(verb, path)  # before parsing: a flag may set one argument of the checkpoint's optimizer
        try:
            with arguments_of_their_class(LENGTH.values()):
                self.config = parser.parse_args(files_first(args))
        except ArgumentError as error:
            raise explain(error, self.verb_parser(verb) if verb else self.parser) from error
        except RecursionError as error:
            raise ConfigError("The config holds itself, or is too deep: look for & and * in it.") from error

    def apply_checkpoint(self) -> None:
        """Take the checkpoint's hyper-parameters as defaults, so that flags and config files beat them.

        Lightning's own puts them over the flags (issue 21455).

        Raises:
            CheckpointError: It is missing, damaged, unsafe, or not one of this project's.
            ConfigError: There is nothing left to train.
        """
        verb = self.config.subcommand
        path = self.config[verb].get("ckpt_path")
        if path == "":
            raise ConfigError("--ckpt_path: '' is no file. Name one, or leave the flag out.")
        if path in WORDS:
            path = self.config[verb].ckpt_path = self._find(verb, path)
        if not path:
            return
        if self._checkpoint is None:  # a word or a config file names it
            self._take_defaults(verb, path)
            self.parse_arguments(self.parser, self._args)
        self.config[verb].ckpt_path = str(path)
        assert self._checkpoint is not None
        if verb in ("validate", "test"):
            self._tell_of_another_split(verb, path)
        epochs, most = epochs_of(self._checkpoint), self.config[verb].trainer.max_epochs
        if verb == "fit" and most is not None and -1 < most <= epochs:
            raise ConfigError(f"{path} has had {epochs} epochs: raise --trainer.max_epochs, which is {most}, to go on.")
        steps, most = self._checkpoint["global_step"], self.config[verb].trainer.max_steps
        if verb == "fit" and -1 < most <= steps:
            raise ConfigError(f"{path} has had {steps} steps: raise --trainer.max_steps, which is {most}, to go on.")

    def _tell_of_another_split(self, verb: str, path: str) -> None:
        """Say where images are held out otherwise than in the fit."""
        assert self._checkpoint is not None
        then, now = split_settings(self._checkpoint, path), self.config[verb].data
        others = [f"data.{key} was {value}" for key, value in then.items() if now.get(key) != value]
        if others:
            print_rank_zero(
                f"Checkpoint: its fit held images out otherwise ({', '.join(others)}): if these are its images, some "
                "of those that are evaluated now were trained on."
            )

    def instantiate_classes(self) -> None:
        """Make the parts.

        Raises:
            ConfigError: One does not take what it was given, or needs a library that is not here.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            raise explain_part(error) from error

    def _find(self, verb: str, word: str) -> str | None:
        """The checkpoint that a word stands for, of the runs on this data."""
        config = self.config[verb]
        if config.trainer.logger not in (None, True, False):
            raise ConfigError(f"--ckpt_path {word} is looked for under {RUNS}/; with another logger, name the file.")
        if not config.name and config.data.root is None and config.data.source is None:
            raise ConfigError(
                f"--ckpt_path {word} of which run? Name it with --name NAME, or the data with --data.root."
            )
        name = config.name or self._name_of_data(verb)
        folder = Path(config.trainer.default_root_dir or RUNS) / name
        found = newest(folder, word)
        if found is None and verb != "fit":
            raise ConfigError(f"There is no {word}.ckpt under {folder}: name a checkpoint with --ckpt_path FILE.")
        print_rank_zero(
            f"Checkpoint: {found}" if found else f"Checkpoint: there is no {word}.ckpt under {folder} yet; a new fit"
        )
        return str(found) if found else None

    def _name_of_data(self, verb: str) -> str:
        parser = LightningArgumentParser()  # of its own: the verb's would make the model and the trainer as well
        parser.add_lightning_class_args(ImageDataModule, "data")
        only = Namespace(data=self.config[verb].data)  # type: ignore[no-untyped-call]
        return str(parser.instantiate_classes(only).data.name)

    def _take_defaults(self, verb: str, path: str) -> None:
        if not Path(path).expanduser().is_file() and nearest(path, WORDS):
            raise ConfigError(f"--ckpt_path: there is no file {path!r}. {nearest(path, WORDS)}")
        self._checkpoint = read_checkpoint(path)
        arguments = hyper_parameters(self._checkpoint, path, ImageClassifier, **PARTS)
        defaults = {f"model.{key}": value for key, value in arguments.items()}
        # As well as how images were held out: or what is validated, or trained on from here, would be others.
        defaults |= {f"data.{key}": value for key, value in split_settings(self._checkpoint, path).items()}
        if verb == "fit" and seed_of(self._checkpoint) is not None:  # it goes on with the same chance
            defaults["seed_everything"] = seed_of(self._checkpoint)
        self.verb_parser(verb).set_defaults(defaults)

    @contextmanager
    def blaming_checkpoint(self) -> Iterator[None]:
        """Report an error while Lightning restores a checkpoint as damage of that checkpoint.

        Raises:
            CheckpointError: Its states are damaged.
        """
        try:
            yield
        except ProjectError:
            raise
        except Exception as error:
            if not lightning_internals.is_restoring(self.trainer):
                raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            path = self.config[self.config.subcommand].ckpt_path
            raise damaged_checkpoint(f"{path} is damaged: its states cannot be restored ({reason}).") from error


def split_checkpoint_flag(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """What ``--ckpt_path`` says on a command line, and the rest of it."""
    flag = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--ckpt_path", nargs="?")
    known, rest = flag.parse_known_args(args)
    return known.ckpt_path, rest


def validate_order(args: Sequence[str]) -> None:
    """Refuse an argument of a class that comes before the class, as the class starts from its own defaults.

    Raises:
        ConfigError: One does.
    """
    seen: list[str] = []
    for word in args:
        name = word.partition("=")[0].removesuffix(".class_path")
        if not name.startswith("--"):
            continue
        early = next((other for other in seen if other.startswith(f"{name}.")), None)
        if early and "." in name:
            raise ConfigError(f"{early} comes before {name}, which starts from its class's own defaults. Put it after.")
        seen.append(name)


def files_first(args: Sequence[str]) -> list[str]:
    """A command line with its config files before all other flags, which beat them wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("-c", "--config"):
            files += [word, *islice(words, 1)]
        elif word.startswith("--config="):
            files.append(word)
        else:
            rest.append(word)
    return [*rest[:1], *files, *rest[1:]] if rest[:1] and not rest[0].startswith("-") else list(args)
