"""Folders of runs: ``runs/NAME/version_N``."""

from __future__ import annotations

import re
from pathlib import Path

from project.errors import ConfigError
from project.runtime.distributed import is_first_process

#: Where they are, unless ``trainer.default_root_dir`` says otherwise.
RUNS = "runs"
#: Words for a checkpoint of the run that saved one last.
WORDS = ("last", "best")


def reserve_version(folder: Path) -> int | None:
    """Make the next ``version_N`` folder of a run, which no other process can have made.

    Args:
        folder: ``runs/NAME``.

    Returns:
        N; ``None`` in the other processes of a distributed run, which write nothing.

    Raises:
        ConfigError: The folder cannot be written.
    """
    if not is_first_process():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(m[1]) for m in (re.fullmatch(r"version_(\d+)", entry.name) for entry in folder.iterdir()) if m]
        number = max(taken, default=-1) + 1
        while True:
            try:
                (folder / f"version_{number}").mkdir()
                return number
            except FileExistsError:  # another fit began at the same moment
                number += 1
    except OSError as error:
        raise ConfigError(f"The run's folder {folder} cannot be written: {error.strerror}.") from error


def newest(folder: Path, word: str) -> Path | None:
    """The checkpoint that was saved last, of all versions of a run.

    Args:
        folder: ``runs/NAME``.
        word: ``last`` or ``best``.

    Returns:
        Its path; ``None`` where there is none.
    """
    found = folder.glob(f"version_*/checkpoints/{word}.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
