"""``sweep`` on the command line: defaults, what it refuses, its folder, and the command that fits its winner."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from project.cli.run_folders import reserve_version
from project.config.class_path import ClassSpec
from project.config.import_allowlist import split_allow_imports
from project.errors import ConfigError
from project.runtime.console import print_rank_zero
from project.runtime.distributed import is_externally_launched
from project.studies.search_space import SearchSpace

#: Images per step; more than in a fit, as the optimizer of many heads takes as long as their products.
BATCH_SIZE = 128
#: Arguments of the model that a sweep sets.
SWEPT = ("head", "head_init", "features", "optimizer", "scheduler", "scheduler_frequency", "label_smoothing")


def sweep_defaults() -> dict[str, Any]:
    """Defaults of the flags: the heads in a form that a config file can store, and the batch size."""
    heads = [ClassSpec.of(head).as_dict() for head in SearchSpace().head]
    return {"space.head": heads, "data.batch_size": BATCH_SIZE}


def validate_sweep(config: Namespace) -> None:
    """Refuse settings of the model, the trainer and the stored features that the candidates would not have.

    Args:
        config: Configuration of the verb, before classes are instantiated.

    Raises:
        ConfigError: Such a setting is given.
    """
    trainer = config.trainer
    refused = {
        "model.interpolate": config.model["interpolate"] not in ("off", False),
        "model.schedule": config.model["schedule"] is not None,
        "model.ema": config.model["ema"] is not None,
        "model.batch_norm train": config.model["batch_norm"] == "train",
        "model.l2_sp": config.model["l2_sp"] != 0,
        "features.cache off": config.features["cache"] in ("off", False),
        "trainer.fast_dev_run": bool(trainer["fast_dev_run"]),
        "trainer.overfit_batches": bool(trainer["overfit_batches"]),
        "trainer.limit_train_batches": trainer["limit_train_batches"] not in (None, 1.0),
        "trainer.max_steps": trainer["max_steps"] != -1,
        "trainer.max_time": trainer["max_time"] is not None,
        "trainer.gradient_clip_val": trainer["gradient_clip_val"] is not None,
        "trainer.accumulate_grad_batches": trainer["accumulate_grad_batches"] > 1,
        "--name with a logger of your own": bool(config.name and trainer["logger"]),
    }
    found = [name for name, is_given in refused.items() if is_given]
    if found:
        raise ConfigError(f"sweep does not support {found[0]}, which its candidates would not have. Remove it.")


def validate_devices(devices: int) -> None:
    """Refuse several devices.

    Raises:
        ConfigError: There are several.
    """
    if devices > 1:
        raise ConfigError(
            f"sweep runs on one device, not on {devices}. Add --trainer.devices 1; the fit of its winner can use "
            "several (fit -c winner.yaml --trainer.devices N)."
        )


def print_replaced(given: Mapping[str, Any]) -> None:
    """Print which settings the search space replaces.

    Args:
        given: Settings that flags and config files set.
    """
    replaced = [f"model.{name}" for name in SWEPT if name in given.get("model", {})]
    replaced += ["trainer.max_epochs"] if "max_epochs" in given.get("trainer", {}) else []
    if replaced:
        print_rank_zero(f"Sweep: the search space replaces {', '.join(replaced)}")


def find_or_reserve(runs: Path, belongs: Callable[[Path], bool]) -> Path:
    """The folder of an unfinished sweep, or a new one.

    Args:
        runs: ``runs/NAME``.
        belongs: Whether a folder belongs to this sweep.

    Raises:
        ConfigError: The folder is not writable.
    """
    known: Path | None = next(filter(belongs, runs.glob("version_*")), None)
    return known or runs / f"version_{reserve_version(runs)}"


def fit_command(program: Sequence[str], config: Path, command: str) -> str:
    """The command that fits the winner.

    Args:
        program: Words of the program's name.
        config: ``winner.yaml``.
        command: Command of the sweep, whose ``--allow_imports`` apply to the fit.
    """
    allowed = [] if is_externally_launched() else split_allow_imports(shlex.split(command))[0]
    imports = [argument for package in allowed for argument in ("--allow_imports", package)]
    return shlex.join([*program, "fit", "-c", str(config), *imports])
