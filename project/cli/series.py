"""``fit --folds K --seeds N``: one fit for each fold and seed, in one process, on a shared feature store."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from project.cli.config_checks import validate_seed
from project.errors import ConfigError
from project.reporting.run_summary import FitFigures
from project.reporting.series_table import SeriesRow, print_series
from project.runtime.console import print_rank_zero
from project.runtime.signals import Interrupted, SignalHandler


class Repetition(NamedTuple):
    """One fit of a series.

    Attributes:
        number: From 1.
        fold: Fold, such as 2/5; ``None`` for the ordinary hold-out.
        seed: Value of ``--seed_everything``.
        args: Command line of an ordinary fit.
    """

    number: int
    fold: str | None
    seed: int
    args: list[str]


@dataclass(frozen=True)
class Series:
    """Fits on all folds with several seeds.

    Seed s of the series adds s to ``--seed_everything`` and to ``data.split_seed``, so each seed has other folds, or
    another hold-out.

    Attributes:
        folds: Number of folds; ``None`` for the ordinary hold-out.
        seeds: Number of seeds.
        first_seed: ``--seed_everything`` of the first seed.
        first_split_seed: ``data.split_seed`` of the first seed.
    """

    folds: int | None
    seeds: int
    first_seed: int
    first_split_seed: int

    @classmethod
    def of(cls, section: Namespace) -> Series | None:
        """The series that a configuration of fit requests; ``None`` for a single fit.

        Raises:
            ConfigError: A value is out of range, or contradicts another setting.
        """
        folds, seeds, data, trainer = section.folds, section.seeds, section.data, section.trainer
        if folds is not None and folds < 2:
            raise ConfigError(f"--folds must be at least 2, got {folds}.")
        if seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {seeds}.")
        if folds is None and seeds == 1:
            return None
        flag = "--folds" if folds is not None else "--seeds"
        contradictions = {
            "--ckpt_path": (section.ckpt_path, "each fit of the series is a new one"),
            "--data.fold": (folds and data.fold, "--folds runs all folds"),
            "--trainer.fast_dev_run": (trainer.fast_dev_run, "it runs only a few batches"),
            "--trainer.limit_val_batches 0": (trainer.limit_val_batches == 0, "nothing would be measured"),
            "--seed_everything without a number": (type(section.seed_everything) is not int, "the seeds count from it"),
        }
        for name, (is_given, reason) in contradictions.items():
            if is_given:
                raise ConfigError(f"{flag} and {name} exclude each other: {reason}. Remove one of them.")
        validate_seed(section.seed_everything + seeds - 1)
        return cls(folds, seeds, section.seed_everything, data.split_seed)

    def __len__(self) -> int:
        return self.seeds * (self.folds or 1)

    def run(
        self,
        args: Sequence[str],
        command: str,
        signals: SignalHandler,
        fit: Callable[[list[str], str], tuple[FitFigures, Path | None]],
    ) -> None:
        """Run the fits, and print a table of those that are complete, also if one is stopped.

        Args:
            args: Command line of the series.
            command: Command that the user has typed, for messages.
            signals: Signal handler of the process.
            fit: Runs a fit, given its command line and the command for messages; returns its accuracies and run folder.

        Raises:
            Interrupted: A signal has stopped the series.
        """
        rows: list[SeriesRow] = []
        try:
            for repetition in self.repetitions(args):
                title = f"fit {repetition.number} of {len(self)}"
                fold = f"fold {repetition.fold}, " if repetition.fold else ""
                print_rank_zero(f"\n{title.capitalize()}: {fold}seed {repetition.seed}")
                signals.deferred = False
                try:
                    figures, run = fit(repetition.args, repetition_command(command, args, repetition.args))
                except Interrupted as error:
                    raise Interrupted(error.number, f"Series: stopped in {title}. {error.message}") from None
                rows.append(SeriesRow(repetition.fold or "", repetition.seed, figures, run))
                if signals.received:
                    raise Interrupted(signals.received, f"Series: stopped after {title}.")
        finally:
            print_series(rows, len(self))

    def repetitions(self, args: Sequence[str]) -> Iterator[Repetition]:
        """The fits of the series, seed by seed.

        Args:
            args: Command line of the series.
        """
        single = _without_series_flags(args)
        for index in range(len(self)):
            offset, fold_index = divmod(index, self.folds or 1)
            fold = f"{fold_index + 1}/{self.folds}" if self.folds else None
            flags = ["--seed_everything", str(self.first_seed + offset)]
            flags += ["--data.split_seed", str(self.first_split_seed + offset)]
            flags += ["--data.fold", fold] if fold else []
            yield Repetition(index + 1, fold, self.first_seed + offset, [*single, *flags])


def repetition_command(command: str, series_args: Sequence[str], args: Sequence[str]) -> str:
    """The command of one fit, given that of the series.

    Args:
        command: Command of the series.
        series_args: Arguments of the series.
        args: Arguments of the fit.
    """
    added = args[len(_without_series_flags(series_args)) :]
    return shlex.join([*_without_series_flags(shlex.split(command)), *added])


def _without_series_flags(args: Sequence[str]) -> list[str]:
    """Remove ``--folds`` and ``--seeds``, and override those that a config file may have."""
    flags = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--folds")
    flags.add_argument("--seeds")
    _, rest = flags.parse_known_args(args)
    has_file = any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args)
    return [*rest, "--folds", "null", "--seeds", "1"] if has_file else rest
