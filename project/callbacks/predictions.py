"""Predictions as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier
from project.errors import ConfigError

COLUMNS = ("path", "predicted", "probability", "top2", "top2_probability", "top3", "top3_probability")


class PredictionWriter(pl.Callback):
    """Writes a row an image: its path, the predicted class with its probability, and the next two.

    Rows go to a temporary file beside the target, which takes the target's name once all are written.

    Args:
        output: The CSV file.
    """

    def __init__(self, output: str) -> None:
        if not output or Path(output).expanduser().is_dir():
            raise ConfigError(f"--output: {output!r} is no name of a file, such as predictions.csv.")
        self._target = Path(output).expanduser()
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}")
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            raise ConfigError("predict writes one file from one process: use --trainer.devices 1.")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output: {self._target} cannot be written: {error.strerror}.") from error
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)

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
        for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
            row: list[str] = [path]
            for value, index in zip(values, indices, strict=True):
                row += [pl_module.classes[index], f"{value:.6f}"]
            self._rows.writerow(row + [""] * (len(COLUMNS) - len(row)))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._file is not None
        self._file.close()
        self._temporary.replace(self._target)
        print(f"Predictions: {self._target}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._discard()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
