"""``--ckpt_path``: find the checkpoint, use its settings as defaults of the flags, and validate it."""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from project.checkpoints import hub
from project.checkpoints.compatibility import validate_classes
from project.checkpoints.metadata import completed_epochs, fit_seed, split_settings
from project.checkpoints.reader import hyper_parameters, read_checkpoint, require_file
from project.checkpoints.restore import CLASS_ARGUMENTS
from project.checkpoints.warm_start import added_classes
from project.classifier import ImageClassifier
from project.cli.argument_order import config_files_first, split_checkpoint_flag, validate_order
from project.cli.parser_errors import explain, explain_instantiation
from project.cli.run_folders import CHECKPOINT_ALIASES, RUNS_FOLDER, newest_checkpoint, run_folder
from project.cli.scheduler_dictionary import expand_scheduler
from project.data.datamodule import ImageDataModule
from project.errors import CheckpointError, ConfigError, ProjectError, damaged_checkpoint, did_you_mean
from project.inference.many_tasks import task_names
from project.models.schedules import LENGTH_ARGUMENT
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.jsonargparse_internals import class_change_resets_arguments
from project.runtime.lightning_cli import VerbCLI
from project.trainer import Trainer

#: Verbs that take several checkpoints, and the settings of the model that then apply to all of them.
SEVERAL_CHECKPOINTS = ("predict", "serve")
COMMON_SETTINGS = ("weights", "channels_last", "compile")


class CheckpointCLI(VerbCLI):
    """Command line in which flags and config files override the settings of a checkpoint.

    Args:
        args: Command line, without the program's name.
        options: Arguments of LightningCLI.

    Attributes:
        data_classes: Class names of the data, as soon as it is instantiated.
    """

    trainer: Trainer
    data_classes: Sequence[str] | None = None

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        self._args = list(args)
        self._checkpoint: dict[str, Any] | None = None
        self._resumes = True  # whether a fit with a checkpoint resumes its fit
        super().__init__(ImageClassifier, ImageDataModule, args=self._args, **options)

    def requested_verb(self) -> str | None:
        """The verb, if it is the first argument."""
        return self._args[0] if self._args and self._args[0] in self.subcommands() else None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line.

        Raises:
            ConfigError: A flag or key is unknown, or has an invalid value.
        """
        validate_order(args)
        verb = next((arg for arg in args if arg in self.subcommands()), None)
        paths, rest = split_checkpoint_flag(args)
        if len(paths) > 1 and verb:
            if verb not in SEVERAL_CHECKPOINTS:
                raise ConfigError(
                    f"--ckpt_path is given {len(paths)} times, but {verb} does not take several checkpoints; "
                    f"only {' and '.join(SEVERAL_CHECKPOINTS)} do. Keep one."
                )
            if not all(paths):
                raise ConfigError("--ckpt_path is empty. Pass a file, or omit the flag.")
            args = [*rest, "--ckpt_path", json.dumps(paths)]  # the parser would use the last one only
        path = paths[0] if len(paths) == 1 else None
        if verb and path and path not in CHECKPOINT_ALIASES and self._checkpoint is None and "--help" not in args:
            # Before parsing, as a flag may change a single argument of the checkpoint's optimizer.
            self._set_defaults_from_checkpoint(verb, path)
        try:
            with class_change_resets_arguments(LENGTH_ARGUMENT.values()):
                self.config = parser.parse_args(expand_scheduler(config_files_first(args)))
        except ArgumentError as error:
            raise explain(error, self.verb_parser(verb) if verb else self.parser) from error
        except RecursionError as error:
            raise ConfigError(
                "The config is recursive or nested too deeply. Check its & and * (YAML aliases)."
            ) from error

    def apply_checkpoint(self) -> None:
        """Use the checkpoint's hyperparameters as defaults, so that flags and config files override them.

        In Lightning they override the flags (issue 21455).

        Raises:
            CheckpointError: The checkpoint is missing, damaged, unsafe, or not from this project.
            ConfigError: The path is empty, or there are several that cannot be used together.
        """
        verb = self.config.subcommand
        path = self.config[verb].get("ckpt_path")
        if isinstance(path, list) and len(path) > 1:
            self._require_several(verb, path)
            return
        if isinstance(path, list):
            path = self.config[verb].ckpt_path = path[0] if path else ""
        if path == "":
            raise ConfigError("--ckpt_path is empty. Pass a file, or omit the flag.")
        if path in CHECKPOINT_ALIASES:
            path = self.config[verb].ckpt_path = self._resolve_alias(verb, path)
        if not path:
            return
        if self._checkpoint is None:  # set by an alias or a config file
            self._set_defaults_from_checkpoint(verb, path)
            self.parse_arguments(self.parser, self._args)
        self.config[verb].ckpt_path = str(path)
        assert self._checkpoint is not None
        if verb in ("fit", "validate", "test"):
            self._warn_if_split_differs(verb, path)

    def before_instantiate_classes(self) -> None:
        """Let a fit with a checkpoint decide whether to resume it, once the data is known."""
        if self.config.subcommand == "fit" and self._checkpoint is not None:
            self.parser.add_instantiator(self._resume_or_start, ImageClassifier, subclasses=False, prepend=True)

    def _resume_or_start(
        self, model_class: type[ImageClassifier], *args: Any, applied_instantiation_links: Any, **kwargs: Any
    ) -> ImageClassifier:
        """Instantiate the model of a fit with a checkpoint, after the data.

        If the data has more classes than the checkpoint, or if other stages are trainable, a new fit starts from the
        checkpoint's weights.

        Raises:
            CheckpointError: The weights do not fit the model.
            ConfigError: No epochs or steps are left to train.
            DataError: The data has other classes.
        """
        assert self._checkpoint is not None
        section, transfer = self.config.fit, self._checkpoint["transfer"]
        before, classes = transfer["classes"], list(self.data_classes or transfer["classes"])
        grown = bool(added_classes(before, classes)) and section.model.classes in (None, before, classes)
        if grown:
            section.model.classes = kwargs["classes"] = classes
        elif section.model.classes:
            validate_classes(classes, section.model.classes)
        model: ImageClassifier = self.instantiate_model(model_class, applied_instantiation_links, *args, **kwargs)
        if not grown and model.is_fit_of(self._checkpoint):
            if str(section.ckpt_path).startswith(hub.SCHEME):
                raise ConfigError(
                    f"{section.ckpt_path} has no optimizer state, so its fit cannot be resumed.\n"
                    "Resume from a checkpoint of the run, or train more stages (--model.trainable) in a new fit."
                )
            self._require_remaining_work(section)
            return model
        try:
            message = model.start_from(self._checkpoint, section.ckpt_path)
        except ProjectError as error:
            raise CheckpointError("{path}: {reason}", path=section.ckpt_path, reason=error) from error
        print_rank_zero(f"Checkpoint: a new fit starts\n{message}")
        self._resumes = False
        return model

    def _require_remaining_work(self, section: Namespace) -> None:
        assert self._checkpoint is not None
        for unit, done, limit in (
            ("epochs", completed_epochs(self._checkpoint), section.trainer.max_epochs),
            ("steps", self._checkpoint["global_step"], section.trainer.max_steps),
        ):
            if limit is not None and -1 < limit <= done:
                raise ConfigError(
                    f"{section.ckpt_path}: {done} {unit} are already complete; "
                    f"increase --trainer.max_{unit} ({limit}) to resume."
                )

    def _require_several(self, verb: str, paths: Sequence[str]) -> None:
        """Check several checkpoints and the flags that are given with them."""
        for path in paths:
            if path in CHECKPOINT_ALIASES:
                raise ConfigError(f"--ckpt_path {path}: of several checkpoints, each must be a file. Pass its path.")
            require_file(path)
        task_names(paths)  # refuses a repeated one
        self.require_common_settings(verb)
        given = self.given_settings(verb)
        refused = [f"--data.{key}" for key in ("root", "source") if given.get("data", {}).get(key) is not None]
        if refused:
            raise ConfigError(
                f"{refused[0]} cannot be set for several checkpoints, because each has its own. Remove it."
            )

    def require_common_settings(self, verb: str) -> None:
        """Check that only settings of the model are given that apply to any checkpoint.

        Raises:
            ConfigError: Another one is given.
        """
        refused = [key for key in self.given_settings(verb).get("model", {}) if key not in COMMON_SETTINGS]
        several = isinstance(self.config[verb].get("ckpt_path"), list)
        if refused and several:
            raise ConfigError(
                f"--model.{refused[0]} cannot be set for several checkpoints, because each has its own. Remove it."
            )
        if refused:
            raise ConfigError(f"--model.{refused[0]} cannot be set for {verb}: the checkpoint has its own. Remove it.")

    def refuse_data_settings(self, verb: str) -> None:
        """Check that no settings of the data are given to a verb that reads none.

        The data may be named together with ``--ckpt_path best`` or ``last``, which it selects.

        Raises:
            ConfigError: A setting has no effect.
        """
        selects_run = any(path in CHECKPOINT_ALIASES for path in split_checkpoint_flag(self._args)[0])
        data = self.given_settings(verb).get("data", {})
        unused = [key for key in data if not (selects_run and key in ("root", "source"))]
        if unused:
            raise ConfigError(f"--data.{unused[0]} has no effect, because {verb} reads no data. Remove it.")

    def given_settings(self, verb: str) -> dict[str, Any]:
        """The settings of a verb that flags and config files set, without defaults."""
        given = self.parser.parse_args(expand_scheduler(config_files_first(self._args)), defaults=False)
        settings: dict[str, Any] = given[verb].as_dict()
        return settings

    def _warn_if_split_differs(self, verb: str, path: str) -> None:
        assert self._checkpoint is not None
        trained, data = split_settings(self._checkpoint, path), self.config[verb].data
        moving = {key: value for key, value in trained.items() if key != "per_class"}  # only leaves out images
        changed = [f"data.{key} was {value}" for key, value in moving.items() if data.get(key) != value]
        if changed:
            print_rank_zero(
                f"Warning: the checkpoint was trained with different split settings ({', '.join(changed)}); "
                "evaluation data may overlap its training data."
            )

    def instantiate_classes(self) -> None:
        """Instantiate the data, the model and the trainer.

        Raises:
            ConfigError: A class rejects its arguments, or needs a library that is not installed.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError) as error:
            raise explain_instantiation(error) from error
        if not self._resumes:  # the model has the checkpoint's weights
            self.config_init[self.config.subcommand].ckpt_path = None

    def _resolve_alias(self, verb: str, alias: str) -> str | None:
        """Find the checkpoint of the latest run on this data; ``None`` if there is none yet and the verb is fit."""
        config = self.config[verb]
        if config.trainer.logger not in (None, True, False):
            raise ConfigError(f"--ckpt_path {alias} searches {RUNS_FOLDER}/ only. With another logger, pass the file.")
        if not config.name and config.data.root is None and config.data.source is None:
            raise ConfigError(f"--ckpt_path {alias}: cannot tell which run. Pass --name or --data.root.")
        name = config.name or self._data_name(verb)
        folder = run_folder(config.trainer.default_root_dir, name)
        path = newest_checkpoint(folder, alias)
        if path is None and verb != "fit":
            raise ConfigError(f"There is no {alias}.ckpt under {folder}. Pass a file with --ckpt_path FILE.")
        print_rank_zero(
            f"Checkpoint: {path}" if path else f"Checkpoint: no {alias}.ckpt under {folder} yet; starting a new fit"
        )
        return str(path) if path else None

    def _data_name(self, verb: str) -> str:
        parser = LightningArgumentParser()  # the verb's parser would also instantiate the model and the trainer
        parser.add_lightning_class_args(ImageDataModule, "data")
        config = Namespace(data=self.config[verb].data)  # type: ignore[no-untyped-call]
        return str(parser.instantiate_classes(config).data.name)

    def _set_defaults_from_checkpoint(self, verb: str, path: str) -> None:
        suggestion = did_you_mean(path, CHECKPOINT_ALIASES)
        if suggestion and not Path(path).expanduser().is_file():
            raise ConfigError(f"--ckpt_path: there is no file {path!r}. {suggestion}".strip())
        self._checkpoint = read_checkpoint(path)
        arguments = hyper_parameters(self._checkpoint, path, ImageClassifier, **CLASS_ARGUMENTS)
        defaults = {f"model.{key}": value for key, value in arguments.items()}
        # The same split: otherwise training images could end up in validation.
        defaults |= {f"data.{key}": value for key, value in split_settings(self._checkpoint, path).items()}
        if verb == "fit" and fit_seed(self._checkpoint) is not None:
            defaults["seed_everything"] = fit_seed(self._checkpoint)
        self.verb_parser(verb).set_defaults(defaults)

    @contextmanager
    def restore_errors(self) -> Iterator[None]:
        """Convert errors during Lightning's restore of a checkpoint.

        Raises:
            CheckpointError: The checkpoint does not fit the model, or its training state is damaged.
        """
        try:
            yield
        except (OSError, MemoryError, torch.OutOfMemoryError):  # not the checkpoint's fault
            raise
        except Exception as error:
            if not lightning_internals.is_restoring(self.trainer):
                raise
            path = self.config[self.config.subcommand].ckpt_path
            if isinstance(error, CheckpointError) and error.path is None:
                located = CheckpointError("{path}: {reason}", path=path, reason=error)
                located.reported_elsewhere = error.reported_elsewhere
                raise located from error
            if isinstance(error, ProjectError):
                raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise damaged_checkpoint(f"{path} is damaged: its training state cannot be restored ({reason}).") from error
