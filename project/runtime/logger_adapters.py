"""What each of Lightning's loggers can take besides numbers.

TensorBoard takes all of it. W&B and MLflow take pictures and texts; CSV's folder gets them as files. All others get the
result as numbers, as they get all metrics from Lightning. Another logger is taught in one place: a function registered
for its class.
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

MOST_COLOURS = 16_384  # of a drawing; a photograph has more
Parameters = Mapping[str, float | int | str | bool]


def log_text(trainer: pl.Trainer, name: str, markdown: str) -> None:
    """Log a text to all loggers that take one; from the first process alone.

    One that cannot be logged is told as a warning: a fit does not end for it.

    Args:
        trainer: Whose loggers.
        name: Of the text, such as model_card.
        markdown: The text.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            try:
                text(logger, name, markdown, trainer.global_step)
            except Exception as error:  # of a full disk, a lost connection, or whatever a logger may meet
                warnings.warn(
                    f"{type(logger).__name__} lacks {name}, which could not be logged: {type(error).__name__}: {error}",
                    stacklevel=2,
                )


@singledispatch
def text(logger: Logger, name: str, markdown: str, step: int) -> None:
    """Log a text."""


@singledispatch
def image(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Log a picture, under a name such as val/confusion."""


@singledispatch
def result(logger: Logger, parameters: Parameters, metrics: Mapping[str, float], step: int) -> None:
    """Log what a run was made with and what came of it, for runs to be compared by."""
    logger.log_metrics(dict(metrics), step)


@singledispatch
def layout(logger: Logger, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Say which numbers share a chart: regular expressions of their names, by group and title."""


@singledispatch
def curves(logger: Logger, name: str, positive: np.ndarray, probabilities: np.ndarray, step: int) -> None:
    """Log a precision-recall curve.

    Args:
        logger: Of the run.
        name: Of the curve.
        positive: Whether each image is of the class, ``(N,)``.
        probabilities: That it is, ``(N,)``.
        step: Of the fit.
    """


@dataclass(frozen=True)
class Points:
    """Images as points, to be turned and searched.

    Attributes:
        values: float ``(N, K)``.
        columns: What is known of each point.
        metadata: N rows of it.
        thumbnails: uint8 ``(N, 3, side, side)``, where there are any.
    """

    values: np.ndarray
    columns: Sequence[str]
    metadata: Sequence[Sequence[str]]
    thumbnails: np.ndarray | None


@singledispatch
def points(logger: Logger, name: str, those: Points, step: int) -> None:
    """Log points for an embedding projector."""


@text.register
def _(logger: TensorBoardLogger, name: str, markdown: str, step: int) -> None:
    logger.experiment.add_text(name, markdown, step)


@image.register
def _(logger: TensorBoardLogger, name: str, picture: Image.Image, step: int) -> None:
    from torch.utils.tensorboard.summary import Summary  # type: ignore[attr-defined]

    # Of photographs, SummaryWriter.add_image would make PNGs of four times the bytes, in forty times the time.
    with io.BytesIO() as file:
        if picture.getcolors(MOST_COLOURS) is None:
            picture.save(file, "JPEG", quality=85)
        else:
            picture.save(file, "PNG")
        encoded = Summary.Image(
            width=picture.width, height=picture.height, colorspace=3, encoded_image_string=file.getvalue()
        )
    logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=encoded)]), step)


@result.register
def _(logger: TensorBoardLogger, parameters: Parameters, metrics: Mapping[str, float], step: int) -> None:
    # SummaryWriter.add_hparams would make a run of its own beside this one. And where a logger has been given no
    # default_hp_metric=False, Lightning has begun the run with an hp_metric of -1.
    logger.log_hyperparams(dict(parameters), dict(metrics), step)


@layout.register
def _(logger: TensorBoardLogger, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    grouped = {
        group: {title: ["Multiline", list(tags)] for title, tags in titles.items()} for group, titles in charts.items()
    }
    logger.experiment.add_custom_scalars(grouped)


@curves.register
def _(logger: TensorBoardLogger, name: str, positive: np.ndarray, probabilities: np.ndarray, step: int) -> None:
    logger.experiment.add_pr_curve(name, positive, probabilities, step)


@points.register
def _(logger: TensorBoardLogger, name: str, those: Points, step: int) -> None:
    logger.experiment.add_embedding(
        those.values,
        # A file's name need not be text.
        metadata=[[cell.encode("utf-8", "backslashreplace").decode() for cell in row] for row in those.metadata],
        metadata_header=list(those.columns),
        label_img=None if those.thumbnails is None else torch.from_numpy(those.thumbnails) / 255,
        global_step=name,  # the first part of the folder; those of steps would lie about in the run's
        tag=f"step{step}",
    )


@text.register
def _(logger: CSVLogger, name: str, markdown: str, step: int) -> None:
    _beside(logger, f"texts/{name}.md").write_text(markdown + "\n", encoding="utf-8")


@image.register
def _(logger: CSVLogger, name: str, picture: Image.Image, step: int) -> None:
    picture.save(_beside(logger, f"figures/{name}.png"))  # the newest alone


def _beside(logger: CSVLogger, name: str) -> Path:
    path = Path(logger.log_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@text.register
def _(logger: WandbLogger, name: str, markdown: str, step: int) -> None:
    logger.log_text(name, ["text"], [[markdown]], step=step)


@image.register
def _(logger: WandbLogger, name: str, picture: Image.Image, step: int) -> None:
    logger.log_image(name, [picture], step=step)


@text.register
def _(logger: MLFlowLogger, name: str, markdown: str, step: int) -> None:
    client: Any = logger.experiment
    client.log_text(logger.run_id, markdown, f"{name}.md")


@image.register
def _(logger: MLFlowLogger, name: str, picture: Image.Image, step: int) -> None:
    client: Any = logger.experiment
    client.log_image(logger.run_id, picture, f"figures/{name}.png")
