"""Lightning's Trainer with this project's checkpoints, exact resumption and progress bar."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ProgressBar

from project.callbacks.exact_resume import ExactResume
from project.callbacks.progress_bar import Progress
from project.checkpoints.io import AtomicCheckpointIO


class Trainer(pl.Trainer):
    """Lightning's Trainer, whose checkpoints are written whole or not at all, and which resumes a fit bit for bit.

    Args:
        args: As Lightning's.
        kwargs: As Lightning's. A progress bar among the callbacks takes the place of this project's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shows_progress = kwargs.get("enable_progress_bar") is not False and not kwargs.get("barebones")
        kwargs["callbacks"] = _with_own(kwargs.get("callbacks"), shows_progress)
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # not where one was asked for
            self.strategy.checkpoint_io = AtomicCheckpointIO()


def _with_own(given: pl.Callback | list[pl.Callback] | None, shows_progress: bool) -> list[pl.Callback]:
    """The callbacks that were passed in, and this project's: a list that Lightning may extend."""
    callbacks = [given] if isinstance(given, pl.Callback) else [*(given or [])]
    if shows_progress and not any(isinstance(each, ProgressBar) for each in callbacks):
        callbacks.append(Progress())
    return [ExactResume(), *callbacks]
