"""Writes predictions to a CSV, JSON Lines or Parquet file, in parts that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from project.callbacks.prediction_columns import CLASSES, ERROR, PATH, AnswerLimits, Column, Value, most_probable
from project.callbacks.prediction_formats import FORMATS
from project.callbacks.prediction_outputs import require_output
from project.callbacks.prediction_parts import Part, PartFolder
from project.checkpoints.hub import SCHEME
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.data.prediction_inputs import fingerprint
from project.data.prediction_loader import PredictionBatch
from project.errors import ConfigError, ProjectError
from project.evaluation.answers.policy import Answered
from project.models.fingerprint import fingerprint_tensors
from project.runtime.atomic_write import require_writable
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup

PART_IMAGES = 4096  # images in memory
FLUSH_SECONDS = 15.0  # seconds of work that a killed run may lose
#: What to do with images that cannot be read.
OnBadImage = Literal["record", "stop"]


class PredictionWriter(pl.Callback):
    """Writes a row per image, in the order of the images: its path, and the three most probable classes.

    A module with several tasks has ``names``, and ``classes`` of each task. The columns of a task are then
    ``NAME/predicted``, ``NAME/probability`` and so on. With limits on the answers, further columns are written: the
    calibrated probability of the predicted class; whether the image is known; the classes of its set; and whether the
    confidence suffices for an answer. The last column, ``error``, says why an image cannot be read.

    Each rank writes parts to the folder ``OUTPUT.parts``. At the end, rank zero merges them to the output, which keeps
    its old content until then. A run with the same images, checkpoint and settings continues an interrupted one. No
    more than a part is in memory.

    Args:
        output: A file that ends in .csv, .jsonl or .parquet.
        limits: What is asked of the answers.
        checkpoints: The checkpoints of the module; a run that has others does not continue this one.
        on_bad_image: Record an image that cannot be read in the column ``error``, or stop.
        features: A safetensors file for the features of each image, in the same order; ``None`` for none.
        settings: Settings that change the predictions, in plain types.

    Attributes:
        fingerprint: SHA-256 of the names of the images.
        pending_count: Number of images that this run predicts, on all ranks.
    """

    def __init__(
        self,
        output: str,
        limits: AnswerLimits | None = None,
        checkpoints: Sequence[str] = (),
        on_bad_image: OnBadImage = "record",
        features: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.fingerprint = ""
        self.pending_count = 0
        self._limits = limits or AnswerLimits()
        self._output = output
        self._target = Path(output).expanduser()
        self._features = None if features is None else Path(features).expanduser()
        self._checkpoints = checkpoints
        self._records_bad_images = on_bad_image == "record"
        self._settings = settings or {}
        self._folder: PartFolder | None = None
        self._peers_waiting = False  # whether other ranks wait for this one
        self._count = 0
        self._reused = 0  # rows that were stored
        self._batches: list[tuple[Sequence[int], list[list[Value]], np.ndarray | None]] = []
        self._flushed = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise ConfigError(
                "PredictionWriter needs an ImageDataModule. Call trainer.predict(model, datamodule=data)."
            )
        require_output(self._output, self._features)
        self._ranks = ranks = ProcessGroup()
        samples = data.predict_images.samples
        self._count = _limit(trainer, data.batch_size, len(samples))
        self.fingerprint = fingerprint(islice(samples, self._count))
        prefixes = [f"{name}/" for name in getattr(module, "names", ())] or [""]
        columns = [Column(f"{prefix}{name}", kind) for prefix in prefixes for name, kind in self._task_columns]
        self._value_count = len(columns)
        folder = PartFolder(self._target, FORMATS[self._target.suffix], [PATH, *columns, ERROR])
        with ranks.propagate_errors():
            if ranks.rank == 0 and self._features is not None:  # written at the end, so a mistake would cost hours
                with self._report_os_error("--output_features", self._features):
                    require_writable(self._features)
        with ranks.propagate_errors(), self._report_os_error():
            if ranks.rank == 0:
                self._folder = folder  # so that it is closed if opening it fails
                folder.open(self._identity(trainer, module))
        with self._report_os_error():
            folder.require_shared(ranks)
            pending = ranks.gather(folder.pending(self._count) if ranks.rank == 0 else None)[0]
        assert pending is not None
        self._folder = folder
        self.pending_count = len(pending)
        if self.pending_count < self._count:
            print_rank_zero(
                f"Predictions: {self._count - self.pending_count:,} of {self._count:,} are reused from an interrupted "
                f"run in {folder.path}"
            )
        data.predict_numbers = pending[ranks.rank_slice(len(pending))]
        data.records_bad_images = self._records_bad_images

    @property
    def _task_columns(self) -> list[Column]:
        return [*CLASSES, *self._limits.columns]

    def _identity(self, trainer: pl.Trainer, module: Any) -> dict[str, Any]:
        """What determines the predictions."""
        classifiers = getattr(module, "classifiers", [module])
        return {
            "checkpoint": [_checkpoint_sha256(path) for path in self._checkpoints],
            "images": [self._count, self.fingerprint],
            "limits": vars(self._limits),
            "output": [self._target.suffix, self._features is not None],
            "settings": {
                "preprocessing": [classifier.backbone.preprocessing.as_dict() for classifier in classifiers],
                "device": trainer.strategy.root_device.type,
                "precision": str(trainer.precision),
                "on_bad_image": self._records_bad_images,
                **self._settings,
            },
        }

    @property
    def earlier_engines(self) -> list[str] | None:
        """Engines that have predicted the earlier part of an interrupted run; ``None`` if there is no such part."""
        assert self._folder is not None
        return self._ranks.gather(self._folder.engines if self._ranks.rank == 0 else None)[0]

    def record_engines(self, names: Sequence[str]) -> None:
        """Record the engines that compute the predictions.

        Args:
            names: Name and precision of each engine.
        """
        assert self._folder is not None
        with self._ranks.propagate_errors(), self._report_os_error():
            if self._ranks.rank == 0:
                self._folder.engines = [*names]

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set_policies(pl_module)
        if isinstance(pl_module, ImageClassifier):
            pl_module.outputs_features = self._features is not None
            self._width = pl_module.backbone.feature_dim
        self._peers_waiting = True
        self._reused = 0
        self._flushed = time.monotonic()

    def _set_policies(self, module: Any) -> None:
        """Let each classifier give the answers that the limits ask for."""
        if isinstance(module, ImageClassifier):
            module.answer_policy = self._limits.policy(module)
        for name, classifier in zip(getattr(module, "names", ()), getattr(module, "classifiers", ()), strict=True):
            try:
                classifier.answer_policy = self._limits.policy(classifier)
            except ConfigError as error:
                raise ConfigError(f"Task {name}: {error}") from error

    @contextlib.contextmanager
    def _report_os_error(self, flag: str = "--output", path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{flag}: {path or self._target} cannot be written: {error.strerror or error}.\n"
                "Finished parts are kept; repeat the command to continue."
            ) from error

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: tuple[Any, ...],
        batch: PredictionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        paths, probabilities, *further = outputs
        answers, features = [*further, None, None][:2]
        images = batch.images
        self._reused += batch.reused
        values: list[list[Value]] = [[] for _ in range(len(images))]
        if isinstance(probabilities, torch.Tensor):
            self._add_values(values, pl_module.classes, probabilities, answers)
        else:
            answers = answers or [None] * len(probabilities)
            for task in zip(pl_module.classes, probabilities, answers, strict=True):
                self._add_values(values, *task)
        missing = [None] * self._value_count
        rows: list[list[Value]] = [
            [path, *(missing if error else found), error or None]
            for path, found, error in zip(paths, values, images.errors, strict=True)
        ]
        array = None
        if features is not None:
            array = features.float().cpu().numpy()
            array[[bool(error) for error in images.errors]] = np.nan
        self._batches.append((images.numbers, rows, array))
        held = sum(len(numbers) for numbers, *_ in self._batches)
        if held >= PART_IMAGES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()
            if self._folder is not None and self._folder.has_failed:
                self._meet_ranks()

    def _add_values(
        self, values: list[list[Value]], classes: Sequence[str], probabilities: torch.Tensor, answers: Answered | None
    ) -> None:
        """Add the values of a task to those of each image."""
        for row, cells in zip(values, most_probable(classes, probabilities), strict=True):
            row += cells
        if answers is not None:
            for row, cells in zip(values, self._limits.values(answers, classes), strict=True):
                row += cells

    def _flush(self) -> None:
        """Write the rows in memory; a part for each run of consecutive images."""
        batches, self._batches = self._batches, []
        self._flushed = time.monotonic()
        if not batches or self._folder is None:
            return
        numbers = np.concatenate([np.asarray(numbers, np.int64) for numbers, *_ in batches])
        rows = [row for _, rows_of_batch, _ in batches for row in rows_of_batch]
        arrays = [array for *_, array in batches if array is not None]
        features = np.concatenate(arrays) if arrays else None
        cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
        with self._report_os_error():
            for begin, end in pairwise(cuts):
                errors = sum(row[-1] is not None for row in rows[begin:end])
                part = Part(int(numbers[begin]), int(numbers[end - 1]) + 1, errors)
                self._folder.write(part, rows[begin:end], None if features is None else features[begin:end])

    def _meet_ranks(self, failure: ProjectError | None = None) -> None:
        """Wait for all ranks, and raise if any has failed."""
        self._peers_waiting = False
        self._ranks.raise_if_any_failed(self._ranks.gather(None if failure is None else str(failure)), failure)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush()
        self._meet_ranks()
        assert self._folder is not None
        errors = 0
        with self._ranks.propagate_errors():
            if self._ranks.rank == 0 and self._features is not None:
                with self._report_os_error("--output_features", self._features):
                    self._folder.merge_features(self._features, self._count, self._width)
            if self._ranks.rank == 0:
                with self._report_os_error():
                    errors = self._folder.merge(self._count)
        reused = sum(self._ranks.gather(self._reused))
        if reused:
            print_rank_zero(f"Features: {reused:,} rows reused from the store")
        unreadable = f", {errors:,} of which cannot be read (column error)" if errors else ""
        images = "image" if self._count == 1 else "images"
        print_rank_zero(f"Predictions: {self._count:,} {images}{unreadable}: {self._target}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._folder is None:
            return
        with contextlib.suppress(ProjectError):  # the first error is reported
            self._flush()
        if isinstance(exception, ProjectError) and self._peers_waiting:
            if self._ranks.size > 1:
                self._folder.report_failure()
            with contextlib.suppress(ProjectError):  # the exception itself, which then says who reports it
                self._meet_ranks(exception)
        self._close()

    def _close(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.close()


def _limit(trainer: pl.Trainer, batch_size: int, count: int) -> int:
    """Number of images to predict.

    Raises:
        ConfigError: ``limit_predict_batches`` is a fraction.
    """
    limit = trainer.limit_predict_batches
    if isinstance(limit, float):
        if limit != 1.0:
            raise ConfigError(
                f"trainer.limit_predict_batches {limit:g} is a fraction. Pass a number of batches, or fewer images."
            )
        return count
    return min(count, limit * batch_size * trainer.world_size)


def _checkpoint_sha256(path: str) -> str:
    """SHA-256 of a checkpoint file, or of the tensors at an address on the Hub, as a push can change them."""
    if path.startswith(SCHEME):
        return fingerprint_tensors(sorted(read_checkpoint(path)["state_dict"].items()))
    file = Path(path).expanduser()
    if not file.is_file():
        return path
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
