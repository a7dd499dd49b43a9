"""Writes predictions to a CSV file."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.answer_columns import AnswerLimits
from project.classifier import ImageClassifier
from project.errors import ConfigError, ProjectError
from project.evaluation.answers.policy import Answered
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup

Rows = list[list[str]] | str | None
#: Columns of a task, after the column ``path``.
COLUMNS = ("predicted", "probability", "top2", "top2_probability", "top3", "top3_probability")


class PredictionWriter(pl.Callback):
    r"""Writes a CSV row per image: its path and the three most probable classes with their probabilities.

    A module with several tasks has ``names``, and ``classes`` of each task. The columns of a task are then
    ``NAME/predicted``, ``NAME/probability`` and so on.

    With limits on the answers, further columns are written: the calibrated probability of the predicted class; whether
    the image is known; the classes of its set, separated by ``|``; and whether the confidence suffices for an answer.

    Rows are written to a temporary file, which is renamed to the target at the end. In a distributed run, rank zero
    gathers and writes the rows batch by batch, so that no rank holds all of them and no shared file system is needed.
    Bytes of a path that are not UTF-8 are written as ``\udcXX``.

    Args:
        output: The CSV file.
        limits: What is asked of the answers.
    """

    def __init__(self, output: str, limits: AnswerLimits | None = None) -> None:
        self._limits = limits or AnswerLimits()
        self._output = output
        self._target = Path(output).expanduser()
        self._open_files: contextlib.ExitStack | None = None
        self._peers_waiting = False  # whether other ranks wait for this one's rows

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ranks = ProcessGroup()
        self._set_policies(pl_module)
        with self._ranks.propagate_errors():
            if self._ranks.rank == 0:
                self._open(pl_module)
        self._peers_waiting = True

    def _set_policies(self, module: Any) -> None:
        """Let each classifier give the answers that the limits ask for."""
        if isinstance(module, ImageClassifier):
            module.answer_policy = self._limits.policy(module)
        for name, classifier in zip(getattr(module, "names", ()), getattr(module, "classifiers", ()), strict=True):
            try:
                classifier.answer_policy = self._limits.policy(classifier)
            except ConfigError as error:
                raise ConfigError(f"Task {name}: {error}") from error

    def _open(self, module: Any) -> None:
        require_output(self._output)
        with self._report_os_error():
            stack = contextlib.ExitStack()
            temporary = stack.enter_context(atomic_write(self._target))
            self._rows = csv.writer(
                stack.enter_context(temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace"))
            )
            prefixes = [f"{name}/" for name in getattr(module, "names", ())] or [""]
            columns = [*COLUMNS, *self._limits.columns]
            self._rows.writerow(["path", *(f"{prefix}{column}" for prefix in prefixes for column in columns)])
            self._open_files = stack

    @contextlib.contextmanager
    def _report_os_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"--output: {self._target} cannot be written: {error.strerror}.") from error

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: tuple[Any, ...],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        paths, probabilities, *answers = outputs
        rows = [[path] for path in paths]
        if isinstance(probabilities, torch.Tensor):
            self._add_cells(rows, pl_module.classes, probabilities, *answers)
        else:
            for task in zip(pl_module.classes, probabilities, *answers, strict=True):
                self._add_cells(rows, *task)
        self._write(rows)

    def _add_cells(
        self,
        rows: list[list[str]],
        classes: Sequence[str],
        probabilities: torch.Tensor,
        answers: Answered | None = None,
    ) -> None:
        """Add the cells of a task to the row of each image."""
        for row, cells in zip(rows, _most_probable(classes, probabilities), strict=True):
            row += cells
        if answers is not None:
            for row, cells in zip(rows, self._limits.cells(answers, classes), strict=True):
                row += cells

    def _write(self, rows: Rows) -> bool:
        """Gather the rows of all ranks and write them in the order of the images.

        Args:
            rows: This rank's rows, ``None`` once it has no more, or the message of its failure.

        Returns:
            Whether any rank may have more rows.
        """
        parts = self._ranks.gather(rows)
        failures = [part if isinstance(part, str) else None for part in parts]
        self._peers_waiting = not any(failure is not None for failure in failures)  # a failure stops all ranks
        self._ranks.raise_if_any_failed(failures)
        if self._open_files is not None:
            # Rank r of R has every R-th image, starting with the r-th.
            interleaved = itertools.zip_longest(*[part for part in parts if isinstance(part, list)])
            with self._report_os_error():
                # Skip padding, which has no path, and the missing rows of shorter parts.
                self._rows.writerows(row for rows_of_all in interleaved for row in rows_of_all if row and row[0])
        return any(part is not None for part in parts)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peers_have_rows = True
        while peers_have_rows:  # with the user's own loaders, other ranks may have more batches
            peers_have_rows = self._write(None)
        self._peers_waiting = False
        if self._open_files is not None:
            files, self._open_files = self._open_files, None
            with self._report_os_error():
                files.close()
        print_rank_zero(f"Predictions: {self._target}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._discard()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._discard()
        if isinstance(exception, ProjectError) and self._peers_waiting:
            self._peers_waiting = False
            try:
                self._write(str(exception))
            except ProjectError as error:
                exception.reported_elsewhere = error.reported_elsewhere

    def _discard(self) -> None:
        if self._open_files is not None:
            files, self._open_files = self._open_files, None
            with contextlib.suppress(OSError):  # from flushing rows that are discarded anyway
                files.__exit__(ConfigError, ConfigError("prediction is incomplete"), None)


def require_output(output: str) -> None:
    """Check that the output can be a file.

    Raises:
        ConfigError: It is empty, or a folder.
    """
    if not output or Path(output).expanduser().is_dir():
        raise ConfigError(f"--output must name a file, such as predictions.csv, not {output!r}.")


def _most_probable(classes: Sequence[str], probabilities: torch.Tensor) -> Iterator[list[str]]:
    """Cells of each image: the three most probable classes with their probabilities ``(B, C)``."""
    best = probabilities.topk(min(3, probabilities.shape[1]))
    for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        pairs = zip(values, indices, strict=True)
        cells = [cell for value, index in pairs for cell in (classes[index], f"{value:.6f}")]
        yield cells + [""] * (len(COLUMNS) - len(cells))
