"""The command line: LightningCLI with the project's defaults, folders of runs, and errors for people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

import project
from project.audit.label_issues import require_scikit_learn
from project.audit.report import check
from project.callbacks.feature_cache import FeatureCache
from project.callbacks.graceful_shutdown import GracefulShutdown
from project.callbacks.model_checkpoint import BestCheckpoint, LastCheckpoint
from project.callbacks.prediction_writer import PredictionWriter
from project.classifier import ImageClassifier
from project.cli.checkpoint_defaults import CheckpointCLI
from project.cli.run_folders import RUNS, reserve_version
from project.cli.short_help import group_help, requested_help, short_help
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.inference import demo
from project.reporting.dashboard import Dashboard
from project.reporting.model_card_callback import ModelCardCallback, card_path
from project.reporting.run_summary import RunSummary, print_evaluation
from project.runtime.lightning_cli import Verb, VerbCLI, option_helps
from project.runtime.signals import SignalHandler
from project.trainer import Trainer

PROGRAM = "python -m project"
USAGE = f"{PROGRAM} VERB [-c config.yaml] [--allow_imports PACKAGE] [flags]"
DESCRIPTIONS = {
    "fit": "Train a classifier on images: a new head, and as much of the backbone as model.trainable says.",
    "validate": "Measure a trained classifier on the validation images.",
    "test": "Measure a trained classifier on the test images.",
}


class TransferCLI(CheckpointCLI):
    """``python -m project VERB``.

    Args:
        args: Command line, without the program's name and ``--allow_imports``.
        signals: What this process is told.
        command: What goes on with it, but for the checkpoint, to be told to a user.
    """

    trainer: Trainer

    def __init__(self, args: Sequence[str], signals: SignalHandler, command: str) -> None:
        self._signals = signals
        self._command = command
        self.exit_code = 0
        super().__init__(
            args,
            trainer_class=Trainer,
            # The report says what trains and what is frozen shorter than the model summary would.
            trainer_defaults={"max_epochs": 10, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": PROGRAM, "description": project.__doc__},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parsers raise their errors, for :func:`main` to put into words, and take whole flags only."""
        # The flags are many, and follow with what each does.
        return super().init_parser(usage=USAGE, exit_on_error=False, allow_abbrev=False, **kwargs)

    def describe(self, verb: str) -> str:
        """What a verb does; Lightning's docstrings say less."""
        return DESCRIPTIONS.get(verb) or super().describe(verb)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, or print the help that is asked for."""
        verb, group = self.requested_verb(), requested_help(args)
        if verb is not None and group is not None:
            options = option_helps(self.verb_parser(verb))
            print(group_help(group, options) if group else short_help(verb, self.describe(verb), USAGE, options))
            sys.exit(0)
        super().parse_arguments(parser, args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put the data before the model: its mistakes are told before any weights are read or downloaded."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(ImageDataModule, "data")
        parser.add_lightning_class_args(ImageClassifier, "model")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Flags of all verbs besides those of the model, the data and the trainer."""
        parser.add_lightning_class_args(FeatureCache, "features")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_argument(
            "--name", type=str | None, help="Folder of the run under runs/; by default the data's name."
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before any weights are read.

        Raises:
            ConfigError: There is no checkpoint to evaluate, or no data.
        """
        verb, config = self.subcommand, self.config[self.subcommand]
        data, model, trainer = config.data, config.model, config.trainer
        # Data is refused before any weights are read for it. ``check`` takes any data, and reads no weights.
        self.parser.add_instantiator(self._make_data, ImageDataModule, subclasses=False, prepend=True)
        if verb == "check" and not config.suspects:
            self.parser.add_instantiator(lambda *_, **__: None, ImageClassifier, subclasses=False, prepend=True)
        wanted = trainer["accelerator"]
        if wanted in ("gpu", "cuda", "mps") and not torch.accelerator.is_available():
            raise ConfigError(f"trainer.accelerator: torch finds no {wanted} here. Use --trainer.accelerator cpu")
        if trainer["barebones"]:
            raise ConfigError(
                "trainer.barebones leaves out the log and the checkpoints that a fit is for. To measure speed alone: "
                "--trainer.logger false --trainer.enable_checkpointing false"
            )
        if trainer["sync_batchnorm"] and model["backbone"].startswith("timm/"):
            raise ConfigError("trainer.sync_batchnorm would strip timm's BatchNorm of its activations. Leave it out.")
        if verb == "check":
            model["trainable"] = "head"  # labels are judged by the whole backbone
            if self.config.check.suspects:
                require_scikit_learn()
        if verb == "demo":
            demo.require(config.port)
            model["compile"] = False  # a page would wait for it longer than for its answers
        name = config.name
        if name and (Path(name).name != name or name == ".."):
            raise ConfigError(
                f"--name: {name!r} is no name of one folder. For another place: --trainer.default_root_dir"
            )
        if verb not in ("fit", "check") and not config.ckpt_path:
            raise ConfigError(
                f"{verb} needs a trained model: name it with --ckpt_path runs/NAME/version_N/checkpoints/best.ckpt"
            )
        if verb == "predict":
            if data["predict"] is None:
                raise ConfigError("Nothing to predict: name an image or a folder with --data.predict PATH")
        elif verb != "demo" and data["root"] is None and data["source"] is None:
            raise ConfigError("No data: name a folder of images with --data.root PATH (PATH/CLASS/*.jpg)")

    def _make_data(self, kind: type[ImageDataModule], *args: Any, **kwargs: Any) -> ImageDataModule:
        data = kind(*args, **kwargs)
        if self.subcommand != "check" and data.source is not None:
            data.source.require()
        return data

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the arguments of their functions that are not flags."""
        inherited = VerbCLI.subcommands()
        verbs = {verb: skipped | {"weights_only"} for verb, skipped in inherited.items()}
        return verbs | {
            "predict": set(),
            "check": {"data", "computation", "provider"},
            "demo": {"model", "data", "device", "precision", "provider"},
        }

    def verbs(self) -> dict[str, Verb]:
        """What the flags of each verb come from."""
        lightning: dict[str, Verb] = {verb: (Trainer, verb) for verb in ("fit", "validate", "test")}
        return {**lightning, "predict": (TransferCLI, "predict"), "check": check, "demo": demo.demo}

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        """Add ``--suspects``, which takes no value."""
        if verb == "check":
            parser.add_argument("--suspects", action="store_true", help="Name images that look like another class.")

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        """Run a verb and print its result. The exit code of ``check`` says whether the data is clean."""
        given = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": flags.get("ckpt_path")}
        provider = self._section.features.provider
        device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        with self.blaming_checkpoint():
            if verb == "fit":
                self.trainer.fit(**given, weights_only=True)  # a checkpoint is never unpickled
                self._report.show(self.trainer, self.model, card_path(self.trainer))
            elif verb in ("validate", "test"):
                getattr(self.trainer, verb)(**given, verbose=False, weights_only=True)
                if flags["verbose"]:  # in fewer digits than Lightning's, and with an interval
                    print_evaluation(self.trainer, self.model, "val" if verb == "validate" else "test")
            elif verb == "predict":
                self.predict(**flags)
            elif verb == "demo":
                demo.demo(
                    self.model, data=self.datamodule, device=device, precision=precision, provider=provider, **flags
                )
            elif self.trainer.global_rank == 0:  # one process checks the data for all
                suspects = self._section.suspects
                computation = self.model.row_computation(device, precision) if suspects else None
                self.exit_code = 0 if check(self.datamodule, computation, provider, **flags) else 1

    def predict(self, ckpt_path: str | None = None, output: str = "predictions.csv") -> None:
        """Predict images, and write a CSV file with a row for each.

        Args:
            ckpt_path: Checkpoint whose model predicts.
            output: The CSV file: path, predicted class, its probability, and the next two classes with theirs.
        """
        del output  # build_callbacks gives it to the callback that writes the file
        self.trainer.predict(
            self.model, datamodule=self.datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=True
        )

    @property
    def _section(self) -> Namespace:
        """Configuration of the verb, with its classes instantiated."""
        section: Namespace = self.config_init[self.subcommand]
        return section

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer: a fit gets its folder, its checkpoints and its dashboard; other verbs write no logs."""
        section, verb = self._section, str(self.subcommand)
        options = {**section.trainer, **kwargs}
        if verb == "fit":
            self._signals.meanwhile = "No batch has been trained since it began: give the same command again."
            options |= self._run_folder(section)
        else:
            options |= {"logger": section.trainer.logger or False, "enable_checkpointing": False}
        self._report = RunSummary(section.dashboard)
        callbacks = build_callbacks(verb, section, GracefulShutdown(self._signals, self._command), self._report)
        if verb == "fit" and not section.trainer.fast_dev_run:
            callbacks.append(SaveConfigCallback(self.verb_parser(verb), self.config[verb]))
        return Trainer(**{**options, "callbacks": callbacks})

    def _run_folder(self, section: Namespace) -> dict[str, Any]:
        """Reserve the folder of a fit, and point the trainer's options to it."""
        given = section.trainer
        if given.fast_dev_run:
            return {}
        if given.logger:  # a logger of the user's has a folder of its own
            if section.name:
                raise ConfigError("--name is of the usual logger. Call yours by its own: --trainer.logger.name NAME")
            return {}
        runs, name = Path(given.default_root_dir or RUNS), section.name or self.datamodule.name
        number = reserve_version(runs / name)
        options: dict[str, Any] = {}
        if number is not None:
            options["default_root_dir"] = runs / name / f"version_{number}"
        if given.logger is None:
            options["logger"] = TensorBoardLogger(runs, name, number, default_hp_metric=False)
        return options


def build_callbacks(
    verb: str, section: Namespace, interruption: GracefulShutdown, report: RunSummary
) -> list[pl.Callback]:
    """The callbacks of a verb, in the order in which Lightning calls them: first those that the user has configured.

    Args:
        verb: Its name.
        section: Its configuration, with instantiated classes.
        interruption: Ends a fit when a signal is received.
        report: Prints what a fit trains, and its result.
    """
    given, trainer = section.trainer.callbacks or [], section.trainer
    callbacks: list[pl.Callback] = [*(given if isinstance(given, list) else [given])]
    callbacks += [section.features, section.dashboard, interruption]
    if verb == "predict":
        callbacks.append(PredictionWriter(section.output))
    if verb != "fit":
        return callbacks
    callbacks.append(report)
    if not trainer.fast_dev_run:
        if trainer.logger is not False:
            callbacks.append(LearningRateMonitor())
        if trainer.enable_checkpointing is not False:
            callbacks += [
                *([BestCheckpoint()] if trainer.limit_val_batches != 0 else []),
                LastCheckpoint(),
                ModelCardCallback(),
            ]
    return callbacks
