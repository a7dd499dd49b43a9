"""Parts of a table of predictions: each is written atomically, and survives if the process is killed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from project.callbacks.feature_file import merge_parts, write_part
from project.callbacks.prediction_columns import Column
from project.callbacks.prediction_formats import PredictionFormat, Rows
from project.errors import ConfigError, DataError
from project.runtime.atomic_write import TEMPORARY_PREFIX, atomic_write, atomic_write_as
from project.runtime.distributed import ProcessGroup

RUN_FILE, ENGINE_FILE, LOCK_FILE, FAILURE_FILE = "run.json", "engines.json", ".lock", "failed"
FEATURES_SUFFIX = ".f32"
#: First image, end, and number of unreadable images.
PART_NAME = re.compile(r"(\d{12})-(\d{12})-(\d+)")


class Part(NamedTuple):
    """A written part.

    Attributes:
        begin: Number of its first image.
        end: Number after its last image.
        errors: Number of its images that cannot be read.
    """

    begin: int
    end: int
    errors: int

    @property
    def stem(self) -> str:
        """Name of its files, without the suffix."""
        return f"{self.begin:012}-{self.end:012}-{self.errors}"


def parts_path(output: Path) -> Path:
    """The folder of the parts of a table, beside it."""
    return output.with_name(f"{output.name}.parts")


class PartFolder:
    """The folder ``OUTPUT.parts`` beside the output. All ranks write parts; rank zero opens, merges and removes it.

    Args:
        output: The table to write.
        format: Its format.
        columns: Its columns.

    Attributes:
        path: The folder.
    """

    def __init__(self, output: Path, format: PredictionFormat, columns: Sequence[Column]) -> None:
        self.path = parts_path(output)
        self._output = output
        self._format = format
        self._columns = columns
        self._lock = FileLock(self.path / LOCK_FILE)

    def open(self, identity: Mapping[str, Any]) -> None:
        """Create the folder, or continue an interrupted run in it.

        Args:
            identity: What determines the predictions, in plain types; the keys are used in messages.

        Raises:
            ConfigError: The folder has parts of another command, or another process is writing it.
            OSError: The folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"--output: another process is writing {self._output}. Use another file.") from error
        for leftover in self.path.glob(f"{TEMPORARY_PREFIX}*"):  # of a killed process
            leftover.unlink(missing_ok=True)
        (self.path / FAILURE_FILE).unlink(missing_ok=True)
        plain = json.loads(json.dumps(identity))
        earlier = self._read(RUN_FILE)
        if earlier != plain and self.parts():
            self._lock.release()
            changed = [
                key for key, value in plain.items() if not isinstance(earlier, dict) or earlier.get(key) != value
            ]
            raise ConfigError(
                f"--output: {self.path} has predictions of an interrupted command with other {' and '.join(changed)}.\n"
                "Repeat that command to complete them, use another --output, or remove the folder to start anew."
            )
        if earlier != plain:
            (self.path / ENGINE_FILE).unlink(missing_ok=True)
            self._write(RUN_FILE, plain)

    def require_shared(self, ranks: ProcessGroup) -> None:
        """Check that all ranks see the folder, before they compute for hours.

        Raises:
            ConfigError: A rank does not see it.
            OSError: Rank zero cannot write to it.
        """
        is_shared = ranks.shares(self.path)
        with ranks.propagate_errors():
            if not is_shared:
                raise ConfigError(
                    f"--output: {self.path} of rank {ranks.rank} is not the folder of rank 0. "
                    "Write to a folder that all nodes share."
                )

    @property
    def engines(self) -> list[str] | None:
        """The engines that have computed the parts; ``None`` if they are not recorded."""
        engines: list[str] | None = self._read(ENGINE_FILE)
        return engines

    @engines.setter
    def engines(self, names: Sequence[str]) -> None:
        self._write(ENGINE_FILE, [*names])

    def parts(self) -> list[Part]:
        """Parts that have no image in common, in the order of their images.

        Parts overlap if rank zero of an earlier run was killed, and another of its ranks still wrote one.
        """
        suffix = self._output.suffix
        names = (PART_NAME.fullmatch(path.stem) for path in self.path.glob(f"*{suffix}"))
        found = (Part(*map(int, match.groups())) for match in names if match)
        parts: list[Part] = []
        for part in sorted(found, key=lambda part: (part.begin, -part.end)):
            if not parts or part.begin >= parts[-1].end:
                parts.append(part)
        return parts

    def pending(self, count: int) -> np.ndarray:
        """Numbers of the images of which there is no part, int64, ascending.

        Args:
            count: Number of all images.
        """
        pending = np.ones(count, bool)
        for part in self.parts():
            pending[part.begin : part.end] = False
        return np.flatnonzero(pending)

    def write(self, part: Part, rows: Rows, features: np.ndarray | None) -> None:
        """Write a part.

        Args:
            part: Which images it has.
            rows: Values of each image.
            features: Features of each image, float32 ``(N, D)``, if there is a file of them.

        Raises:
            OSError: The folder cannot be written.
        """
        if features is not None:  # first, as the part counts as written once its table exists
            with self._new_file(f"{part.stem}{FEATURES_SUFFIX}") as temporary:
                write_part(temporary, features)
        with self._new_file(f"{part.stem}{self._output.suffix}") as temporary:
            self._format.write(temporary, self._columns, rows)

    def report_failure(self) -> None:
        """Let the other ranks stop at their next part."""
        with contextlib.suppress(OSError):  # they stop at their end instead
            (self.path / FAILURE_FILE).touch()

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed."""
        return (self.path / FAILURE_FILE).exists()

    def merge_features(self, output: Path, count: int, width: int) -> None:
        """Merge the features of all parts to a file, in constant memory.

        Args:
            output: The safetensors file to write.
            count: Number of images.
            width: Width of the features.

        Raises:
            DataError: Parts are missing.
            OSError: The file cannot be written.
        """
        files = [self.path / f"{part.stem}{FEATURES_SUFFIX}" for part in self._complete_parts(count)]
        with atomic_write(output) as temporary:
            merge_parts(files, temporary, count, width, {"rows": f"in the order of {self._output.name}"})

    def merge(self, count: int) -> int:
        """Merge all parts to the output, in constant memory, and remove the folder.

        Args:
            count: Number of images.

        Returns:
            Number of images that cannot be read.

        Raises:
            DataError: Parts are missing.
            OSError: The output cannot be written.
        """
        parts = self._complete_parts(count)
        with atomic_write(self._output) as temporary:
            tables = (self.path / f"{part.stem}{self._output.suffix}" for part in parts)
            self._format.merge(tables, temporary, self._columns)
        self._remove()
        return sum(part.errors for part in parts)

    def _complete_parts(self, count: int) -> list[Part]:
        """The parts, which together have all images."""
        parts = self.parts()
        expected = 0
        for part in parts:
            if part.begin != expected:
                break
            expected = part.end
        if expected != count:
            following = next((part.begin for part in parts if part.begin > expected), count)
            raise DataError(
                f"The predictions of images {expected} to {following - 1} are missing from {self.path}. "
                "Repeat the command to compute them."
            )
        return parts

    def close(self) -> None:
        """Release the folder, and remove it if it has no parts."""
        if self._lock.is_locked:
            if self.parts():
                self._lock.release()
            else:
                self._remove()

    def _remove(self) -> None:
        """Remove the locked folder. Its identity is removed last, so that a killed removal can be repeated."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.name not in (RUN_FILE, LOCK_FILE):
                    path.unlink()
            (self.path / RUN_FILE).unlink(missing_ok=True)
            (self.path / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):  # another process has opened it
            self.path.rmdir()

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, name: str, value: Any) -> None:
        with self._new_file(name) as temporary:
            temporary.write_text(json.dumps(value, indent=1), "utf-8")

    def _new_file(self, name: str) -> AbstractContextManager[Path]:
        """Write a file atomically. The folder must exist, so that a rank of a killed run does not create it anew."""
        return atomic_write_as(self.path, lambda _: name, Path(name).suffix)
