"""Run folders: ``runs/NAME/version_N``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from project.checkpoints.reader import read_checkpoint
from project.checkpoints.warm_start import added_classes
from project.errors import ConfigError, ProjectError
from project.runtime.console import print_rank_zero
from project.runtime.distributed import is_first_process

#: Parent of all run folders, unless ``trainer.default_root_dir`` is set.
RUNS_FOLDER = "runs"
#: Values of ``--ckpt_path`` that mean a checkpoint of the latest run.
CHECKPOINT_ALIASES = ("last", "best")


def run_folder(root: str | Path | None, name: str) -> Path:
    """``runs/NAME``, the parent of the versions of a run.

    Args:
        root: ``trainer.default_root_dir``, which replaces ``runs``; it may start with ``~``.
        name: Name of the run.
    """
    return Path(root or RUNS_FOLDER).expanduser() / name


def reserve_version(folder: Path) -> int | None:
    """Create the next ``version_N`` folder of a run. Safe with concurrent fits.

    Args:
        folder: ``runs/NAME``.

    Returns:
        N; ``None`` on ranks other than zero, which write nothing.

    Raises:
        ConfigError: The folder is not writable.
    """
    if not is_first_process():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        matches = [re.fullmatch(r"version_(\d+)", entry.name) for entry in folder.iterdir()]
        number = max((int(match[1]) for match in matches if match), default=-1) + 1
        while True:
            try:
                (folder / f"version_{number}").mkdir()
                return number
            except FileExistsError:  # a concurrent fit has just created it
                number += 1
    except OSError as error:
        raise ConfigError(f"Cannot write to the run folder {folder}: {error.strerror}.") from error


@contextmanager
def removed_on_error(folder: Path | None) -> Iterator[None]:
    """Context in which an exception removes a run's folder, and that of its name, if they are empty."""
    try:
        yield
    except Exception:
        with suppress(OSError):  # not empty
            for empty in (folder, folder.parent) if folder is not None else ():
                empty.rmdir()
        raise


def newest_checkpoint(folder: Path, alias: str) -> Path | None:
    """The most recently saved checkpoint among all versions of a run.

    Args:
        folder: ``runs/NAME``.
        alias: ``last`` or ``best``.

    Returns:
        Its path; ``None`` if there is none.
    """
    paths = folder.glob(f"version_*/checkpoints/{alias}.ckpt")
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def report_new_classes(folder: Path, classes: Sequence[str]) -> None:
    """Print which classes are new since the latest version of a run, if there is one.

    Args:
        folder: ``runs/NAME``.
        classes: Class names of the data.
    """
    try:
        path = newest_checkpoint(folder, "last") if is_first_process() else None
        before = read_checkpoint(path, mmap=True)["transfer"]["classes"] if path else ()
    except (OSError, ProjectError):  # only a note depends on that checkpoint
        return
    new = added_classes(before, classes)
    if path and new:
        noun = "class" if len(new) == 1 else "classes"
        print_rank_zero(f"Data: {len(new)} new {noun} since {path.parents[1]} ({', '.join(new)})")
