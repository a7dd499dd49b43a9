"""The command line: LightningCLI with this project's verbs, defaults and run folders."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
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
from project.checkpoints.reader import read_checkpoint
from project.checkpoints.warm_start import added_classes
from project.classifier import ImageClassifier
from project.cli.checkpoint_defaults import CheckpointCLI
from project.cli.run_folders import RUNS_FOLDER, newest_checkpoint, reserve_version
from project.cli.series import Series, repetition_command
from project.cli.short_help import group_help, requested_help, short_help
from project.config.class_path import ClassSpec
from project.config.import_allowlist import split_allow_imports
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError, ProjectError
from project.inference import demo
from project.inference.many_tasks import ManyTasks
from project.reporting.dashboard import Dashboard
from project.reporting.model_card_callback import ModelCardCallback, card_path
from project.reporting.run_summary import RunSummary, print_evaluation
from project.reporting.series_table import SeriesRow, print_series
from project.runtime.console import print_rank_zero
from project.runtime.distributed import is_externally_launched, is_first_process
from project.runtime.lightning_cli import Verb, VerbCLI, option_helps
from project.runtime.signals import Interrupted, SignalHandler
from project.studies.search_space import SearchSpace
from project.studies.sweep import sweep
from project.studies.trials import write_winner
from project.trainer import Trainer

PROGRAM = "python -m project"
USAGE = f"{PROGRAM} VERB [-c config.yaml] [--allow_imports PACKAGE] [flags]"
#: Images per step of a sweep; larger than that of a fit, as the optimizer of many heads takes as long as the products.
SWEEP_BATCH_SIZE = 128
#: Arguments of the model that a sweep sets.
SWEPT = ("head", "head_init", "features", "optimizer", "scheduler", "label_smoothing")
DESCRIPTIONS = {
    "fit": "Train an image classifier: a new head, and the backbone stages that model.trainable names.",
    "validate": "Evaluate a trained classifier on the validation images.",
    "test": "Evaluate a trained classifier on the test images.",
}


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
            ConfigError: The flags of a series are out of range, or contradict others.
        """
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
        verb, config = self.subcommand, self.config[self.subcommand]
        data, model, trainer = config.data, config.model, config.trainer
        self.parser.add_instantiator(self._make_data, ImageDataModule, subclasses=False, prepend=True)
        # ``check`` without ``--suspects`` needs no model.
        if verb == "check" and not config.suspects:
            self.parser.add_instantiator(lambda *_, **__: None, ImageClassifier, subclasses=False, prepend=True)
        if isinstance(config.get("ckpt_path"), list):
            self.parser.add_instantiator(self._make_tasks, ImageClassifier, subclasses=False, prepend=True)
        accelerator = trainer["accelerator"]
        if accelerator in ("gpu", "cuda", "mps") and not torch.accelerator.is_available():
            raise ConfigError(f"trainer.accelerator: torch finds no {accelerator}. Use --trainer.accelerator cpu")
        if trainer["barebones"]:
            raise ConfigError(
                "trainer.barebones is not supported: it disables logs and checkpoints. To measure speed: "
                "--trainer.logger false --trainer.enable_checkpointing false"
            )
        if trainer["sync_batchnorm"] and model["backbone"].startswith("timm/"):
            raise ConfigError("trainer.sync_batchnorm would remove the activations in timm's BatchNorm. Remove it.")
        if verb == "check":
            model["trainable"] = "head"  # suspects are found with features of the whole backbone
            if config.suspects:
                require_scikit_learn()
        if verb == "demo":
            demo.require(config.port)
            model["compile"] = False  # compiling takes longer than the page's predictions
        name = config.name
        if name and (Path(name).name != name or name == ".."):
            raise ConfigError(
                f"--name: {name!r} is not a single folder name. To change the parent: --trainer.default_root_dir"
            )
        if verb not in ("fit", "check", "sweep") and not config.ckpt_path:
            raise ConfigError(f"{verb} needs a trained model: --ckpt_path runs/NAME/version_N/checkpoints/best.ckpt")
        if verb == "predict":
            if data["predict"] is None:
                raise ConfigError("Nothing to predict. Pass an image or a folder with --data.predict PATH")
        elif verb != "demo" and data["root"] is None and data["source"] is None:
            raise ConfigError("No data. Pass a folder of images with --data.root PATH (PATH/CLASS/*.jpg)")

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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs, each with the arguments of its function that are not flags."""
        inherited = VerbCLI.subcommands()
        verbs = {verb: skipped | {"weights_only"} for verb, skipped in inherited.items()}
        return verbs | {
            "predict": set(),
            "check": {"data", "prefix", "provider"},
            "demo": {"model", "data", "device", "precision", "provider"},
            "sweep": {"model", "data", "device", "precision", "provider", "folder"},
        }

    def verbs(self) -> dict[str, Verb]:
        """Function or method of each verb, which defines its flags."""
        lightning: dict[str, Verb] = {verb: (Trainer, verb) for verb in ("fit", "validate", "test")}
        return {**lightning, "predict": (TransferCLI, "predict"), "check": check, "demo": demo.demo, "sweep": sweep}

    def add_verb_arguments(self, verb: str, parser: LightningArgumentParser) -> None:
        """Add flags that no signature has: those of a series, ``--suspects``, and a sweep's heads in a form to save."""
        if verb == "sweep":
            heads = [ClassSpec.of(head).as_dict() for head in SearchSpace().head]
            parser.set_defaults({"space.head": heads, "data.batch_size": SWEEP_BATCH_SIZE})
        if verb == "fit":
            parser.add_argument(
                "--folds", type=int | None, help="Fit once for each of so many cross-validation folds, and compare."
            )
            parser.add_argument("--seeds", type=int, default=1, help="Fit with so many seeds, and compare.")
        if verb == "check":
            parser.add_argument("--suspects", action="store_true", help="List images that look like another class.")

    def run_verb(self, verb: str, flags: dict[str, Any]) -> None:
        """Run a verb and print its result. ``check`` sets the exit code to 1 if it finds problems."""
        if self._series is not None:
            self._run_series(self._series)
            return
        inputs = {"model": self.model, "datamodule": self.datamodule, "ckpt_path": flags.get("ckpt_path")}
        provider = self._section.features.provider
        device, precision = self.trainer.strategy.root_device, str(self.trainer.precision)
        with self.restore_errors():
            if verb == "fit":
                self.trainer.fit(**inputs, weights_only=True)  # checkpoints are never unpickled
                self.summary.show(self.trainer, self.model, card_path(self.trainer))
            elif verb in ("validate", "test"):
                getattr(self.trainer, verb)(**inputs, verbose=False, weights_only=True)
                if flags["verbose"]:  # with fewer digits than Lightning's table, and confidence intervals
                    print_evaluation(self.trainer, self.model, "val" if verb == "validate" else "test")
            elif verb == "predict":
                self.predict(**flags)
            elif verb == "demo":
                demo.demo(
                    self.model, data=self.datamodule, device=device, precision=precision, provider=provider, **flags
                )
            elif verb == "sweep":
                self._sweep(device, precision, flags)
            elif self.trainer.global_rank == 0:  # a single rank checks the data
                suspects = self._section.suspects
                prefix = self.model.prefix_spec(device, precision) if suspects else None
                self.exit_code = 0 if check(self.datamodule, prefix, provider, **flags) else 1

    def _run_series(self, series: Series) -> None:
        """Run the fits of a series, and print a table of those that have completed, also if one is stopped."""
        rows: list[SeriesRow] = []
        try:
            for repetition in series.repetitions(self._args):
                fold = f"fold {repetition.fold}, " if repetition.fold else ""
                print_rank_zero(f"\nFit {repetition.number} of {len(series)}: {fold}seed {repetition.seed}")
                command = repetition_command(self._resume_command, self._args, repetition.args)
                self._signals.deferred = False
                cli = TransferCLI(repetition.args, self._signals, command, is_repetition=True)
                figures, folder = cli.summary.figures(cli.trainer, cli.model), cli.trainer.log_dir
                run = Path(folder) if folder else None
                rows.append(SeriesRow(repetition.fold or "", repetition.seed, figures, run))
                if self._signals.received:
                    raise Interrupted(self._signals.received, f"Stopped after fit {len(rows)} of {len(series)}.")
        finally:
            print_series(rows, len(series))

    def _sweep(self, device: torch.device, precision: str, flags: dict[str, Any]) -> None:
        """Run a sweep, then the fit of its winner."""
        self._validate_sweep()
        self._signals.message = "Run the same command again to continue the sweep."
        trainer = self._section.trainer
        runs = Path(trainer.default_root_dir or RUNS_FOLDER) / (self._section.name or self.datamodule.name)

        def folder(belongs: Callable[[Path], bool]) -> Path:
            known: Path | None = next(filter(belongs, runs.glob("version_*")), None)
            return known or runs / f"version_{reserve_version(runs)}"

        # As class_path and init_args, which a checkpoint can store; jsonargparse instantiates them as closures.
        flags["space"].head = [head.as_dict() for head in self.config["sweep"].space.head]
        provider = self._section.features.provider
        target, trial = sweep(self.model, self.datamodule, device, precision, provider, folder, **flags)
        config = yaml.safe_load(self.verb_parser("sweep").dump(self.config["sweep"], skip_none=False))
        path = write_winner(target, {key: value for key, value in config.items() if key not in flags}, trial)
        allowed = [] if is_externally_launched() else split_allow_imports(shlex.split(self._resume_command))[0]
        imports = [argument for package in allowed for argument in ("--allow_imports", package)]
        command = shlex.join([*PROGRAM.split(), "fit", "-c", str(path), *imports])
        print_rank_zero(f"Sweep: all candidates are in {target / 'sweep.csv'}; to repeat this fit: {command}")
        self.exit_code = TransferCLI(["fit", "-c", str(path)], self._signals, command).exit_code

    def _validate_sweep(self) -> None:
        """Refuse what a sweep cannot do, and print which settings do not apply to it."""
        section, trainer = self._section, self._section.trainer
        if self.trainer.world_size > 1:
            raise ConfigError(
                f"sweep runs on one device, not on {self.trainer.world_size}. Add --trainer.devices 1; the fit of its "
                "winner can use several (fit -c winner.yaml --trainer.devices N)."
            )
        refused = {
            "features.cache off": self.config["sweep"].features.cache in ("off", False),
            "trainer.fast_dev_run": bool(trainer.fast_dev_run),
            "trainer.overfit_batches": bool(trainer.overfit_batches),
            "trainer.limit_train_batches": trainer.limit_train_batches not in (None, 1.0),
            "trainer.gradient_clip_val": trainer.gradient_clip_val is not None,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
            "--name with a logger of your own": bool(section.name and trainer.logger),
        }
        found = [name for name, is_given in refused.items() if is_given]
        if found:
            raise ConfigError(f"sweep does not support {found[0]}, which its candidates would not have. Remove it.")
        given = self.given_settings("sweep")
        replaced = [f"model.{name}" for name in SWEPT if name in given.get("model", {})]
        replaced += ["trainer.max_epochs"] if "max_epochs" in given.get("trainer", {}) else []
        if replaced:
            print_rank_zero(f"Sweep: the search space replaces {', '.join(replaced)}")

    def predict(self, ckpt_path: list[str] | str | None = None, output: str = "predictions.csv") -> None:
        """Predict images and write one row per image to a CSV file.

        Args:
            ckpt_path: Checkpoint of the model. Repeat the flag for several tasks, which then share their backbones.
            output: CSV file of path, predicted class and its probability, and the next two classes with probabilities;
                several checkpoints have these columns each, preceded by NAME/ of the run.
        """
        del output  # used by build_callbacks
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
        options = {**section.trainer, **kwargs}
        if verb == "fit":
            self._signals.message = "No batch has been trained yet; run the same command again."
            options |= self._run_folder(section)
        else:
            options |= {"logger": section.trainer.logger or False, "enable_checkpointing": False}
        self.summary = RunSummary(section.dashboard)
        callbacks = build_callbacks(verb, section, GracefulShutdown(self._signals, self._resume_command), self.summary)
        if verb == "fit" and not section.trainer.fast_dev_run:
            config = self.config[verb].clone()
            for flag in ("folds", "seeds"):  # of a series, which other verbs do not have
                config.pop(flag)
            callbacks.append(SaveConfigCallback(self.verb_parser(verb), config))
        trainer = Trainer(**{**options, "callbacks": callbacks})
        if self._is_repetition and trainer.world_size > 1:
            raise ConfigError(
                f"--folds and --seeds run on one device, not on {trainer.world_size}. Add --trainer.devices 1"
            )
        return trainer

    def _report_new_classes(self, folder: Path) -> None:
        """Print which classes the data has in addition to those of the latest run in a folder, if there is one."""
        try:
            path = newest_checkpoint(folder, "last") if is_first_process() else None
            before = read_checkpoint(path, mmap=True)["transfer"]["classes"] if path else ()
        except (OSError, ProjectError):  # only a note depends on that checkpoint
            return
        new = added_classes(before, self.data_classes or ())
        if path and new:
            noun = "class" if len(new) == 1 else "classes"
            print_rank_zero(f"Data: {len(new)} new {noun} since {path.parents[1]} ({', '.join(new)})")

    def _run_folder(self, section: Namespace) -> dict[str, Any]:
        """Create the run folder of a fit; returns the trainer options for it."""
        trainer = section.trainer
        if trainer.fast_dev_run:
            return {}
        if trainer.logger:  # the user's logger has its own folder
            if section.name:
                raise ConfigError("--name applies only to the default logger; use --trainer.logger.name NAME.")
            return {}
        runs, name = Path(trainer.default_root_dir or RUNS_FOLDER), section.name or self.datamodule.name
        if not section.ckpt_path:
            self._report_new_classes(runs / name)
        number = reserve_version(runs / name)
        options: dict[str, Any] = {}
        if number is not None:
            options["default_root_dir"] = runs / name / f"version_{number}"
        if trainer.logger is None:
            options["logger"] = TensorBoardLogger(runs, name, number, default_hp_metric=False)
        return options


def build_callbacks(verb: str, section: Namespace, shutdown: GracefulShutdown, report: RunSummary) -> list[pl.Callback]:
    """Callbacks of a verb in Lightning's calling order, starting with the user's.

    Args:
        verb: Name of the verb.
        section: Its configuration, with instantiated classes.
        shutdown: Stops a fit after a signal.
        report: Prints the summary of a fit.
    """
    trainer, user_callbacks = section.trainer, section.trainer.callbacks or []
    callbacks: list[pl.Callback] = [*(user_callbacks if isinstance(user_callbacks, list) else [user_callbacks])]
    callbacks += [section.features, section.dashboard, shutdown]
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
