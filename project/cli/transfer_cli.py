"""The command line: LightningCLI with the project's defaults, folders of runs, and errors for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import project
from project.audit.label_issues import require_scikit_learn
from project.callbacks.feature_cache import FeatureCache
from project.callbacks.graceful_shutdown import Interruption
from project.callbacks.model_checkpoint import Best, Last
from project.classifier import SGD, ImageClassifier
from project.cli.checkpoint_defaults import CheckpointCLI
from project.cli.run_folders import RUNS, reserve_version
from project.config.class_path import describe
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.inference import demo
from project.reporting.dashboard import Dashboard
from project.reporting.model_card_callback import RunCard, card_path
from project.reporting.run_summary import Report, evaluated
from project.runtime.signals import Signals
from project.trainer import Trainer

PROGRAM = "python -m project"


class TransferCLI(CheckpointCLI):
    """``python -m project VERB``.

    Args:
        args: Command line, without the program's name and ``--allow_imports``.
        signals: What this process is told.
        command: What goes on with it, but for the checkpoint, to be told to a user.
    """

    trainer: Trainer

    def __init__(self, args: Sequence[str], signals: Signals, command: str) -> None:
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
        usage = f"{PROGRAM} VERB [-c config.yaml] [--allow_imports PACKAGE] [flags]"
        return super().init_parser(usage=usage, exit_on_error=False, allow_abbrev=False, **kwargs)

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
        parser.set_defaults({"model.optimizer": describe(SGD)})  # the parser cannot read a partial
        parser.add_argument(
            "--name", type=str | None, help="Folder of the run under runs/; by default the data's name."
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and the arguments of their methods that are not flags."""
        inherited = LightningCLI.subcommands()
        verbs = {verb: skipped | {"weights_only"} for verb, skipped in inherited.items()}
        return {**verbs, "check": {"model", "datamodule", "suspects"}, "demo": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let ``--suspects`` be said without a value."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "check":
            parser.add_argument("--suspects", action="store_true", help="Name images that look like another class.")
        return parser

    def _add_instantiators(self) -> None:
        """Refuse data before any weights are read for it; ``check`` takes any data, and reads none."""
        super()._add_instantiators()
        self.parser.add_instantiator(self._make_data, ImageDataModule, subclasses=False, prepend=True)
        if self.subcommand == "check" and not self.config.check.suspects:
            self.parser.add_instantiator(lambda *_, **__: None, ImageClassifier, subclasses=False, prepend=True)

    def _make_data(self, kind: type[ImageDataModule], *args: Any, **kwargs: Any) -> ImageDataModule:
        data = kind(*args, **kwargs)
        if self.subcommand != "check" and data.source is not None:
            data.source.require()
        return data

    def check(self, **arguments: Any) -> None:
        """Examine the data; the exit code says whether it is clean."""
        suspects = self.config.check.suspects
        self.exit_code = 0 if self.trainer.check(**arguments, suspects=suspects) else 1

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work before any weights are read.

        Raises:
            ConfigError: There is no checkpoint to evaluate, or no data.
        """
        data, verb = self._get(self.config, "data"), self.subcommand
        model, trainer = self._get(self.config, "model"), self._get(self.config, "trainer")
        wanted = trainer["accelerator"]
        if wanted in ("gpu", "cuda", "mps") and not torch.accelerator.is_available():
            raise ConfigError(f"trainer.accelerator: torch finds no {wanted} here. Use --trainer.accelerator cpu")
        if trainer["sync_batchnorm"] and model["backbone"].startswith("timm/"):
            raise ConfigError("trainer.sync_batchnorm would strip timm's BatchNorm of its activations. Leave it out.")
        if verb == "check":
            model["trainable"] = "head"  # labels are judged by the whole backbone
            if self.config.check.suspects:
                require_scikit_learn()
        if verb == "demo":
            demo.require(self._get(self.config, "port"))
            model["compile"] = False  # a page would wait for it longer than for its answers
        name = self._get(self.config, "name")
        if name and (Path(name).name != name or name == ".."):
            raise ConfigError(
                f"--name: {name!r} is no name of one folder. For another place: --trainer.default_root_dir"
            )
        if verb not in ("fit", "check") and not self._get(self.config, "ckpt_path"):
            raise ConfigError(
                f"{verb} needs a trained model: name it with --ckpt_path runs/NAME/version_N/checkpoints/best.ckpt"
            )
        if verb == "predict":
            if data["predict"] is None:
                raise ConfigError("Nothing to predict: name an image or a folder with --data.predict PATH")
        elif verb != "demo" and data["root"] is None and data["source"] is None:
            raise ConfigError("No data: name a folder of images with --data.root PATH (PATH/CLASS/*.jpg)")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give a fit its folder, its checkpoints and its dashboard; the other verbs write no logs."""
        given = self._get(self.config_init, "trainer")
        interruption = Interruption(self._signals, self._command)
        if self.subcommand == "fit":
            self._signals.meanwhile = "No batch has been trained since it began: give the same command again."
        if self.subcommand != "fit":
            self.save_config_callback = None
            silent = {"logger": given["logger"] or False, "enable_checkpointing": False}
            self.trainer_defaults["callbacks"] = [interruption]
            return super().instantiate_trainer(**silent, **kwargs)
        self._report = Report(self._get(self.config_init, "dashboard"))
        callbacks: list[pl.Callback] = [interruption, self._report]
        if not given["fast_dev_run"]:
            if not given["logger"]:  # a logger of the user's has a folder of its own
                runs = Path(given["default_root_dir"] or RUNS)
                name = self._get(self.config_init, "name") or self.datamodule.name
                number = reserve_version(runs / name)
                if number is not None:
                    kwargs["default_root_dir"] = runs / name / f"version_{number}"
                if given["logger"] is None:
                    kwargs["logger"] = TensorBoardLogger(runs, name, number, default_hp_metric=False)
            elif self._get(self.config_init, "name"):
                raise ConfigError("--name is of the usual logger. Call yours by its own: --trainer.logger.name NAME")
            if given["logger"] is not False:
                callbacks.append(LearningRateMonitor())
            if given["enable_checkpointing"] is not False:
                callbacks += [*([Best()] if given["limit_val_batches"] != 0 else []), Last(), RunCard()]
        self.trainer_defaults["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Never unpickle a checkpoint."""
        if subcommand in ("check", "demo"):
            return super()._prepare_subcommand_kwargs(subcommand)
        given = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        self._tells = given.get("verbose", False)
        return given | ({"verbose": False} if self._tells else {})  # told here, in fewer digits and with an interval

    def after_validate(self) -> None:
        """Print the result."""
        if self._tells:
            evaluated(self.trainer, self.model, "val")

    def after_test(self) -> None:
        """Print the result."""
        if self._tells:
            evaluated(self.trainer, self.model, "test")

    def after_fit(self) -> None:
        """Print the result."""
        self._report.show(self.trainer, self.model, card_path(self.trainer))
