"""The command line: LightningCLI with this project's verbs, defaults and run folders."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

import project
from project.audit.report import check
from project.callbacks.feature_cache import FeatureCache
from project.callbacks.graceful_shutdown import GracefulShutdown
from project.callbacks.prediction_writer import OnBadImage
from project.classifier import ImageClassifier
from project.cli.checkpoint_defaults import CheckpointCLI
from project.cli.config_checks import validate_config, validate_seed
from project.cli.run_folders import removed_on_error, report_new_classes, reserve_version, run_folder
from project.cli.series import Series
from project.cli.short_help import group_help, requested_help, short_help
from project.cli.sweep_command import (
    find_or_reserve,
    fit_command,
    print_replaced,
    sweep_defaults,
    validate_devices,
    validate_sweep,
)
from project.cli.verb_callbacks import build_callbacks
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.inference import demo, export, push
from project.inference.many_tasks import ManyTasks
from project.inference.serving.serve import serve
from project.reporting.dashboard import Dashboard
from project.reporting.model_card_callback import card_path
from project.reporting.run_summary import FitFigures, RunSummary, print_evaluation
from project.runtime.console import print_rank_zero
from project.runtime.lightning_cli import Verb, VerbCLI, option_helps
from project.runtime.signals import SignalHandler
from project.studies.sweep import sweep
from project.studies.trials import write_winner
from project.trainer import Trainer

PROGRAM = "python -m project"
USAGE = f"{PROGRAM} VERB [-c config.yaml] [--allow_imports PACKAGE] [flags]"
#: Settings of the model that say what is trained of the backbone.
SETTINGS_OF_CUT = (
    *("trainable", "lr_decay", "adapter", "lora_rank", "lora_targets"),
    *("schedule", "schedule_patience", "schedule_warmup"),
)
#: Flags of fit that its config.yaml does not contain, as they do not belong to a single fit.
FLAGS_ONLY = ("folds", "seeds", "lr_find", "debug")
DESCRIPTIONS = {
    "fit": "Train an image classifier: a new head, and the backbone stages that model.trainable names.",
    "validate": "Evaluate a trained classifier on the validation images.",
    "test": "Evaluate a trained classifier on the test images.",
}


class SaveConfigWithRate(SaveConfigCallback):
    """Saves the config when training starts, with the learning rate that ``--lr_find`` has found."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing, as the rate is not known yet."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the config."""
        self.config["model.optimizer.init_args.lr"] = pl_module.hparams["optimizer"]["init_args"]["lr"]
        super().setup(trainer, pl_module, "fit")


class TransferCLI(CheckpointCLI):
    """``python -m project VERB``.

    Args:
        args: Command line, without the program's name and ``--allow_imports``.
        signals: Signal handler of the process.
        resume_command: Command that resumes the fit, without its checkpoint; printed for the user.
        is_repetition: Whether this is a fit of a series.

    Attributes:
        exit_code: Exit code of the verb.
    """

    def __init__(
        self, args: Sequence[str], signals: SignalHandler, resume_command: str, is_repetition: bool = False
    ) -> None:
        self._signals = signals
        self._is_repetition = is_repetition
        self._series: Series | None = None
        self._resume_command = resume_command
        self.exit_code = 0
        super().__init__(
            args,
            trainer_class=Trainer,
            # RunSummary replaces the model summary.
            trainer_defaults={"max_epochs": 10, "enable_model_summary": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": PROGRAM, "description": project.__doc__},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser that raises errors instead of exiting, and accepts no abbreviated flags."""
        return super().init_parser(usage=USAGE, exit_on_error=False, allow_abbrev=False, **kwargs)

    def describe(self, verb: str) -> str:
        """One-line description of a verb."""
        return DESCRIPTIONS.get(verb) or super().describe(verb)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, or print the requested help and exit."""
        verb, group = self.requested_verb(), requested_help(args)
        if verb is not None and group is not None:
            options = option_helps(self.verb_parser(verb))
            print(group_help(group, options) if group else short_help(verb, self.describe(verb), USAGE, options))
            sys.exit(0)
        super().parse_arguments(parser, args)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the data before the model, so that data errors are raised before weights are read or downloaded."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(ImageDataModule, "data")
        parser.add_lightning_class_args(ImageClassifier, "model")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flags of all verbs besides those of the model, the data and the trainer."""
        parser.add_lightning_class_args(FeatureCache, "features")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.add_argument(
            "--name", type=str | None, help="Name of the run's folder under runs/; the name of the data by default."
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of errors.")

    def apply_checkpoint(self) -> None:
        """Use the checkpoint's settings as defaults; a series of fits accepts no checkpoint.

        Raises:
            ConfigError: The seed, or the flags of a series, are out of range, or contradict others.
        """
        validate_seed(self.config[self.config.subcommand].seed_everything)
        if self.config.subcommand == "fit":
            self._series = Series.of(self.config.fit)
        super().apply_checkpoint()

    def instantiate_classes(self) -> None:
        """Instantiate the data, the model and the trainer; a series does so for each of its fits."""
        if self._series is None:
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Reject invalid configurations before any weights are read.

        Raises:
            ConfigError: A required flag is missing, or flags contradict each other.
        """
        super().before_instantiate_classes()
        verb, config = str(self.subcommand), self.config[self.subcommand]
        if verb == "predict":
            self._use_images(config)
        self.parser.add_instantiator(self._make_data, ImageDataModule, subclasses=False, prepend=True)
        # ``push`` and ``check`` without ``--suspects`` need no model.
        if verb == "push" or (verb == "check" and not config.suspects):
            self.parser.add_instantiator(lambda *_, **__: None, ImageClassifier, subclasses=False, prepend=True)
        if verb == "serve":
            self.require_common_settings(verb)
            self.refuse_data_settings(verb)
            self.parser.add_instantiator(self._load_later, ImageClassifier, subclasses=False, prepend=True)
        elif isinstance(config.get("ckpt_path"), list):
            self.parser.add_instantiator(self._make_tasks, ImageClassifier, subclasses=False, prepend=True)
        if config.debug and "--debug" not in self._args:
            raise ConfigError("debug has no effect in a config file. Remove it there, and pass --debug.")
        if verb == "check" and not config.suspects and "top" in self.given_settings(verb):
            raise ConfigError("--top is the number of suspects. Add --suspects, or remove it.")
        validate_config(verb, config)
        if verb == "fit" and config.lr_find and self._checkpoint is not None:
            self._use_rate_of_checkpoint(config.model)
        if verb == "sweep":
            validate_sweep(config)
        if verb == "check":
            # Suspects are found with features of the whole backbone, and nothing is trained.
            arguments = inspect.signature(ImageClassifier).parameters
            for name in SETTINGS_OF_CUT:
                config.model[name] = arguments[name].default
        if verb == "demo":
            config.model["compile"] = False  # compiling takes longer than the page's predictions

    def _use_images(self, config: Namespace) -> None:
        """Pass the value of ``--images`` to the data."""
        flag = "--data.on_bad_image"
        if any(arg.partition("=")[0] == flag for arg in self._args):
            raise ConfigError(f"{flag} is for labeled images. predict takes --on_bad_image record or stop.")
        if config.images is not None and config.data.predict is not None:
            raise ConfigError("--images and data.predict are both set; keep one.")
        if config.images is not None:
            config.data.predict = config.images

    def _use_rate_of_checkpoint(self, model: Namespace) -> None:
        """Let a fit that is resumed with ``--lr_find`` continue with the rate that it has found, not the config's."""
        assert self._checkpoint is not None
        saved = self._checkpoint["hyper_parameters"]["optimizer"]
        if saved["class_path"] == model["optimizer"].class_path and "lr" in saved["init_args"]:
            model["optimizer"].init_args.lr = saved["init_args"]["lr"]

    def _make_data(self, cls: type[ImageDataModule], *args: Any, **kwargs: Any) -> ImageDataModule:
        """Create the data module, and check its source before weights are read; ``check`` accepts invalid data."""
        data = cls(*args, **kwargs)
        if self.subcommand != "check" and data.source is not None:
            data.source.require()
            self.data_classes = data.classes
        return data

    def _make_tasks(self, cls: type[ImageClassifier], *args: Any, **kwargs: Any) -> ManyTasks:
        """Load the classifiers of several checkpoints, with the settings that apply to all of them."""
        verb = str(self.subcommand)
        tasks = ManyTasks.load(self.config[verb].ckpt_path, **self.given_settings(verb).get("model", {}))
        print_rank_zero(tasks.describe())
        return tasks

    def _load_later(self, cls: type[ImageClassifier], *args: Any, **kwargs: Any) -> Callable[[], ManyTasks]:
        """A function that loads the classifiers of a server, which answers that it is not ready until then."""
        paths, settings = self.config.serve.ckpt_path, self.given_settings("serve").get("model", {})
        return functools.partial(ManyTasks.load, paths if isinstance(paths, list) else [paths], **settings)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs, each with the arguments of its function that are not flags."""
        inherited = VerbCLI.subcommands()
        verbs = {verb: skipped | {"weights_only"} for verb, skipped in inherited.items()}
        return verbs | {
            "predict": set(),
            "check": {"data", "prefix", "provider"},
            "demo": {"model", "data", "device", "precision", "provider"},
            "export": {"model", "data"},
            "push": set(),
            "serve": {"load", "device", "precision", "provider"},
            "sweep": {"model", "data", "device", "precision", "provider", "folder"},
        }

    def verbs(self) -> dict[str, Verb]:
        """Function or method of each verb, which defines its flags."""
        lightning: dict[str, Verb] = {verb: (Trainer, verb) for verb in ("fit", "validate", "test")}
        functions: dict[str, Verb] = {"check": check, "demo": demo.demo, "export": export.export, "sweep": sweep}
        return {**lightning, "predict": (TransferCLI, "predict"), **functions, "push": push.push, "serve": serve}

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        """Add flags that no signature has: those of a series, ``--suspects``, and a sweep's heads in a form to save."""
        if verb == "sweep":
            parser.set_defaults(sweep_defaults())
        if verb == "fit":
            parser.add_argument(
                "--folds", type=int | None, help="Fit once for each of so many cross-validation folds, and compare."
            )
            parser.add_argument("--seeds", type=int, default=1, help="Fit with so many seeds, and compare.")
            parser.add_argument(
                "--lr_find", action="store_true", help="Find the learning rate by a range test, and use it."
            )
        if verb == "predict":
            parser.add_argument(
                "--images",
                nargs="+",
                type=str,
                help="Images to predict: files, folders, glob patterns, tables with a column path, tar files, or - for "
                "names on standard input, separated by newlines or null bytes.",
            )
        if verb == "check":
            parser.add_argument("--suspects", action="store_true", help="List images that look like another class.")

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        """Run a verb and print its result. ``check`` sets the exit code to 1 if it finds problems."""
        if self._series is not None:
            self._series.run(self._args, self._resume_command, self._signals, self._run_fit)
            return
        run: dict[str, Callable[..., None]] = {
            "fit": self._fit,
            "validate": functools.partial(self._evaluate, "validate"),
            "test": functools.partial(self._evaluate, "test"),
            "predict": self.predict,
            "check": self._check,
            "demo": self._demo,
            "export": self._export,
            "push": self._push,
            "serve": self._serve,
            "sweep": self._sweep,
        }
        with self.restore_errors():
            run[verb](**flags)

    @property
    def _engine_settings(self) -> dict[str, Any]:
        """What chooses the engine of a frozen prefix."""
        return {
            "device": self.trainer.strategy.root_device,
            "precision": str(self.trainer.precision),
            "provider": self._section.features.provider,
        }

    def _fit(self, ckpt_path: str | None) -> None:
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path, weights_only=True)
        self.summary.show(self.trainer, self.model, card_path(self.trainer))

    def _evaluate(self, verb: str, ckpt_path: str | None, verbose: bool) -> None:
        """Run ``validate`` or ``test``, and print the metrics: more precisely than Lightning, and with intervals."""
        evaluate = getattr(self.trainer, verb)
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        if verbose:
            print_evaluation(self.trainer, self.model, "val" if verb == "validate" else "test")

    def _check(self, **flags: Any) -> None:
        if self.trainer.global_rank > 0:  # a single rank checks the data
            return
        settings = self._engine_settings
        prefix = self.model.prefix_spec(settings["device"], settings["precision"]) if self._section.suspects else None
        self.exit_code = 0 if check(self.datamodule, prefix, settings["provider"], **flags) else 1

    def _demo(self, **flags: Any) -> None:
        demo.demo(self.model, data=self.datamodule, **self._engine_settings, **flags)

    def _export(self, **flags: Any) -> None:
        if self.trainer.global_rank == 0:
            export.export(self.model, data=self.datamodule, **flags)

    def _push(self, **flags: Any) -> None:
        if self.trainer.global_rank == 0:
            push.push(**flags)

    def _serve(self, **flags: Any) -> None:
        if self.trainer.world_size > 1:
            raise ConfigError(f"serve runs on one device, not on {self.trainer.world_size}. Add --trainer.devices 1")
        serve(self.model, **self._engine_settings, **flags)

    def _run_fit(self, args: list[str], command: str) -> tuple[FitFigures, Path | None]:
        """Run a fit of a series; returns its accuracies and its run folder."""
        cli = TransferCLI(args, self._signals, command, is_repetition=True)
        folder = cli.trainer.log_dir
        return cli.summary.figures(cli.trainer, cli.model), Path(folder) if folder else None

    def _sweep(self, **flags: Any) -> None:
        """Run a sweep, then the fit of its winner."""
        validate_devices(self.trainer.world_size)
        print_replaced(self.given_settings("sweep"))
        self._signals.message = "Run the same command again to continue the sweep."
        section, config = self._section, self.config["sweep"]
        runs = run_folder(section.trainer.default_root_dir, section.name or self.datamodule.name)
        # As class_path and init_args, which a checkpoint can store; jsonargparse instantiates them as closures.
        flags["space"].head = [head.as_dict() for head in config.space.head]
        folder = functools.partial(find_or_reserve, runs)
        target, trial = sweep(self.model, self.datamodule, folder=folder, **self._engine_settings, **flags)
        settings = yaml.safe_load(self.verb_parser("sweep").dump(config, skip_none=False))
        kept = {key: value for key, value in settings.items() if key not in (*flags, *FLAGS_ONLY)}
        path = write_winner(target, kept, trial)
        command = fit_command(PROGRAM.split(), path, self._resume_command)
        print_rank_zero(f"Sweep: all candidates are in {target / 'sweep.csv'}; to repeat this fit: {command}")
        self.exit_code = TransferCLI(["fit", "-c", str(path)], self._signals, command).exit_code

    def predict(
        self,
        ckpt_path: list[str] | str | None = None,
        output: str = "predictions.csv",
        coverage: float | None = None,
        max_error: float | None = None,
        false_alarms: float | None = None,
        on_bad_image: OnBadImage = "record",
        output_features: str | None = None,
    ) -> None:
        """Predict images and write one row per image to a CSV, JSON Lines or Parquet file.

        Args:
            ckpt_path: Checkpoint of the model. Repeat the flag for several tasks, which then share their backbones.
            output: File of path, predicted class and its probability, and the next two classes with probabilities, that
                ends in .csv, .jsonl or .parquet; several checkpoints have these columns each, preceded by NAME/ of the
                run. The same command continues an interrupted one.
            coverage: Add the column set: classes that contain the right one with this probability, such as 0.95.
            max_error: Add the column answered: yes for images so certain that at most this share of them is wrong,
                such as 0.01.
            false_alarms: Add the column known: no for images unlike the training images; at most this share of the
                images of known classes is called unknown, such as 0.05.
            on_bad_image: record writes a row with the column error for an image that cannot be read; stop stops.
            output_features: Write the features of each image to this safetensors file, too.
        """
        del output, coverage, max_error, false_alarms, on_bad_image, output_features  # used by build_callbacks
        self.trainer.predict(
            self.model,
            datamodule=self.datamodule,
            return_predictions=False,
            ckpt_path=None if isinstance(ckpt_path, list) else ckpt_path,  # several are loaded already
            weights_only=True,
        )

    @property
    def _section(self) -> Namespace:
        """Configuration of the verb, with instantiated classes."""
        section: Namespace = self.config_init[self.subcommand]
        return section

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Create the trainer. Only fit has a run folder, checkpoints and logs."""
        section, verb = self._section, str(self.subcommand)
        options, own = {**section.trainer, **kwargs}, {}
        if verb == "fit":
            again = f"run: {self._resume_command}" if self._is_repetition else "run the same command again."
            self._signals.message = f"No batch has been trained yet; {again}"
            own = self._run_folder(section)
        else:
            options |= {"logger": section.trainer.logger or False, "enable_checkpointing": False}
        if verb == "predict":
            self._signals.message = "Run the same command again to continue."
        self.summary = RunSummary(section.dashboard)
        callbacks = build_callbacks(verb, section, GracefulShutdown(self._signals, self._resume_command), self.summary)
        if verb == "fit" and not section.trainer.fast_dev_run:
            config = self.config[verb].clone()
            for flag in FLAGS_ONLY:
                config.pop(flag)
            searches = section.lr_find and not (section.ckpt_path and self._resumes)
            saves = SaveConfigWithRate if searches else SaveConfigCallback
            callbacks.append(saves(self.verb_parser(verb), config))
        with removed_on_error(own.get("default_root_dir")):
            trainer = Trainer(**{**options, **own, "callbacks": callbacks})
            if self._is_repetition and trainer.world_size > 1:
                raise ConfigError(
                    f"--folds and --seeds run on one device, not on {trainer.world_size}. Add --trainer.devices 1"
                )
        return trainer

    def _run_folder(self, section: Namespace) -> dict[str, Any]:
        """Create the run folder of a fit; returns the trainer options for it."""
        trainer = section.trainer
        if trainer.fast_dev_run:
            return {}
        if trainer.logger:  # the user's logger has its own folder
            if section.name:
                raise ConfigError("--name applies only to the default logger; use --trainer.logger.name NAME.")
            return {}
        folder = run_folder(trainer.default_root_dir, section.name or self.datamodule.name)
        if not section.ckpt_path:
            report_new_classes(folder, self.data_classes or ())
        number = reserve_version(folder)
        options: dict[str, Any] = {}
        if number is not None:
            options["default_root_dir"] = folder / f"version_{number}"
        if trainer.logger is None:
            options["logger"] = TensorBoardLogger(folder.parent, folder.name, number, default_hp_metric=False)
        return options
