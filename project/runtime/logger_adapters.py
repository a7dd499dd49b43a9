"""Log texts, images, curves and embeddings to the Lightning loggers that support them.

TensorBoard supports all of them, W&B and MLflow texts and images; the CSV logger's folder receives both as files. Other
loggers receive metrics only. To support another logger, register functions for its class.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

MAX_COLORS = 16_384  # images with more colors are photographs, not plots
Parameters = Mapping[str, float | int | str | bool]


def log_text(trainer: pl.Trainer, name: str, markdown: str) -> None:
    """Log a text to all loggers that support it, on rank zero. A failure is a warning and does not end the fit.

    Args:
        trainer: Trainer with the loggers.
        name: Name of the text, such as ``model_card``.
        markdown: The text.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            try:
                add_text(logger, name, markdown, trainer.global_step)
            except Exception as error:  # a full disk, a lost connection, ...
                warnings.warn(
                    f"{type(logger).__name__} could not log {name}: {type(error).__name__}: {error}", stacklevel=2
                )


@singledispatch
def add_text(logger: Logger, name: str, markdown: str, step: int) -> None:
    """Log a text."""


@singledispatch
def add_image(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    """Log an image under a name such as ``val/confusion``."""


@singledispatch
def add_result(logger: Logger, parameters: Parameters, metrics: Mapping[str, float], step: int) -> None:
    """Log the hyperparameters and final metrics of a run, to compare runs."""
    logger.log_metrics(dict(metrics), step)


@singledispatch
def add_chart_layout(logger: Logger, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Define charts of several metrics: ``{group: {title: [regular expressions of metric names]}}``."""


@singledispatch
def add_pr_curve(logger: Logger, name: str, positive: np.ndarray, probabilities: np.ndarray, step: int) -> None:
    """Log a precision-recall curve.

    Args:
        logger: Logger of the run.
        name: Name of the curve.
        positive: bool ``(N,)``, whether each image belongs to the class.
        probabilities: float ``(N,)``, predicted probability of the class.
        step: Step of the fit.
    """


@dataclass(frozen=True)
class EmbeddingPoints:
    """Points of an embedding projector, one per image.

    Attributes:
        values: float ``(N, K)``.
        columns: Column names of the metadata.
        metadata: N rows.
        thumbnails: uint8 ``(N, 3, side, side)``, or ``None``.
    """

    values: np.ndarray
    columns: Sequence[str]
    metadata: Sequence[Sequence[str]]
    thumbnails: np.ndarray | None


@singledispatch
def add_embedding(logger: Logger, name: str, points: EmbeddingPoints, step: int) -> None:
    """Log points for an embedding projector."""


@add_text.register
def _(logger: TensorBoardLogger, name: str, markdown: str, step: int) -> None:
    logger.experiment.add_text(name, markdown, step)


@add_image.register
def _(logger: TensorBoardLogger, name: str, image: Image.Image, step: int) -> None:
    from torch.utils.tensorboard.summary import Summary  # type: ignore[attr-defined]

    # SummaryWriter.add_image encodes photographs as PNG, with four times the bytes and forty times the time.
    with io.BytesIO() as file:
        if image.getcolors(MAX_COLORS) is None:
            image.save(file, "JPEG", quality=85)
        else:
            image.save(file, "PNG")
        encoded = Summary.Image(
            width=image.width, height=image.height, colorspace=3, encoded_image_string=file.getvalue()
        )
    logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=encoded)]), step)


@add_result.register
def _(logger: TensorBoardLogger, parameters: Parameters, metrics: Mapping[str, float], step: int) -> None:
    # SummaryWriter.add_hparams would create a separate run. Without default_hp_metric=False, Lightning has already
    # logged an hp_metric of -1.
    logger.log_hyperparams(dict(parameters), dict(metrics), step)


@add_chart_layout.register
def _(logger: TensorBoardLogger, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    grouped = {
        group: {title: ["Multiline", list(tags)] for title, tags in titles.items()} for group, titles in charts.items()
    }
    logger.experiment.add_custom_scalars(grouped)


@add_pr_curve.register
def _(logger: TensorBoardLogger, name: str, positive: np.ndarray, probabilities: np.ndarray, step: int) -> None:
    logger.experiment.add_pr_curve(name, positive, probabilities, step)


@add_embedding.register
def _(logger: TensorBoardLogger, name: str, points: EmbeddingPoints, step: int) -> None:
    logger.experiment.add_embedding(
        points.values,
        # File names may not be valid UTF-8.
        metadata=[[cell.encode("utf-8", "backslashreplace").decode() for cell in row] for row in points.metadata],
        metadata_header=list(points.columns),
        label_img=None if points.thumbnails is None else torch.from_numpy(points.thumbnails) / 255,
        global_step=name,  # the parent folder: without it, the folder of each step would be in the run's folder
        tag=f"step{step}",
    )


@add_text.register
def _(logger: CSVLogger, name: str, markdown: str, step: int) -> None:
    _prepare_path(logger, f"texts/{name}.md").write_text(markdown + "\n", encoding="utf-8")


@add_image.register
def _(logger: CSVLogger, name: str, image: Image.Image, step: int) -> None:
    image.save(_prepare_path(logger, f"figures/{name}.png"))  # replaces the image of an earlier step


def _prepare_path(logger: CSVLogger, name: str) -> Path:
    """Path of a file in the logger's folder, with its parent folders created."""
    path = Path(logger.log_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@add_text.register
def _(logger: WandbLogger, name: str, markdown: str, step: int) -> None:
    logger.log_text(name, ["text"], [[markdown]], step=step)


@add_image.register
def _(logger: WandbLogger, name: str, image: Image.Image, step: int) -> None:
    logger.log_image(name, [image], step=step)


@add_text.register
def _(logger: MLFlowLogger, name: str, markdown: str, step: int) -> None:
    client: Any = logger.experiment
    client.log_text(logger.run_id, markdown, f"{name}.md")


@add_image.register
def _(logger: MLFlowLogger, name: str, image: Image.Image, step: int) -> None:
    client: Any = logger.experiment
    client.log_image(logger.run_id, image, f"figures/{name}.png")
