"""Predictions as a CSV file."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier
from project.errors import ConfigError, ProjectError
from project.runtime.atomic_write import replacing
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup

Rows = list[list[str]] | str | None
COLUMNS = ("path", "predicted", "probability", "top2", "top2_probability", "top3", "top3_probability")


class PredictionWriter(pl.Callback):
    r"""Writes a row an image: its path, the predicted class with its probability, and the next two.

    Rows go to a temporary file beside the target, which takes the target's name once all are written. Of several
    processes, which have every so many-th image each, the first one writes; it gets the others' rows batch by batch,
    so that nobody holds them all, and no file has to be seen by more than one node. Bytes of a path that are not UTF-8
    are written as ``\udcXX``.

    Args:
        output: The CSV file.
    """

    def __init__(self, output: str) -> None:
        if not output or Path(output).expanduser().is_dir():
            raise ConfigError(f"--output: {output!r} is no name of a file, such as predictions.csv.")
        self._target = Path(output).expanduser()
        self._open_files: contextlib.ExitStack | None = None
        self._parted = True  # whether no process waits for this one

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ranks = ProcessGroup()
        with self._ranks.together():
            if self._ranks.rank == 0:
                self._open()
        self._parted = False

    def _open(self) -> None:
        with self._saying_so():
            stack = contextlib.ExitStack()
            temporary = stack.enter_context(replacing(self._target))
            self._rows = csv.writer(
                stack.enter_context(temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace"))
            )
            self._rows.writerow(COLUMNS)
            self._open_files = stack

    @contextlib.contextmanager
    def _saying_so(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--output: {self._target} cannot be written: {error.strerror}.") from error

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: tuple[Sequence[str], torch.Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, ImageClassifier)
        paths, probabilities = outputs
        best = probabilities.topk(min(3, probabilities.shape[1]))
        rows = []
        for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            row: list[str] = [path]
            for value, index in zip(values, indices, strict=True):
                row += [pl_module.classes[index], f"{value:.6f}"]
            rows.append(row + [""] * (len(COLUMNS) - len(row)))
        self._write(rows)

    def _write(self, rows: Rows) -> bool:
        """Write the rows of all processes, in the images' order; says whether there may be more of them.

        Args:
            rows: This process's; ``None`` once it has no more, or why it fails.
        """
        parts = self._ranks.gather(rows)
        failures = [part if isinstance(part, str) else None for part in parts]
        self._parted = any(failure is not None for failure in failures)  # nobody waits where all fail
        self._ranks.fail(failures)
        if self._open_files is not None:
            ordered = itertools.zip_longest(*[part for part in parts if isinstance(part, list)])
            with self._saying_so():
                # Padding has no path, and a process with fewer rows than others none at all.
                self._rows.writerows(row for each in ordered for row in each if row and row[0])
        return any(part is not None for part in parts)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        more = True
        while more:  # others may have a batch more, if the loaders are the user's
            more = self._write(None)
        self._parted = True
        if self._open_files is not None:
            written, self._open_files = self._open_files, None
            with self._saying_so():
                written.close()
        print_rank_zero(f"Predictions: {self._target}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._discard()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._discard()
        if isinstance(exception, ProjectError) and not self._parted:
            self._parted = True
            try:
                self._write(str(exception))
            except ProjectError as error:
                exception.reported_elsewhere = error.reported_elsewhere

    def _discard(self) -> None:
        if self._open_files is not None:
            broken_off, self._open_files = self._open_files, None
            with contextlib.suppress(OSError):  # what is left to be written is of no use
                broken_off.__exit__(ConfigError, ConfigError("not all was predicted"), None)
