"""Lightning's Trainer with this project's checkpoints, exact resumption and progress bar."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ProgressBar

from project.callbacks.answer_calibration import AnswerCalibration
from project.callbacks.exact_resume import ExactResume
from project.callbacks.interpolation import Interpolation
from project.callbacks.learning_rate_finder import LearningRateFinder
from project.callbacks.progress_bar import FitProgressBar
from project.callbacks.solved_head import SolvedHead
from project.callbacks.staged_unfreezing import StagedUnfreezing
from project.checkpoints.io import AtomicCheckpointIO
from project.runtime import lightning_internals


class Trainer(pl.Trainer):
    """Lightning's Trainer with atomic checkpoint writes and bit-exact resumption.

    Args:
        args: Passed to Lightning's Trainer.
        kwargs: Passed to Lightning's Trainer. A progress bar among the callbacks replaces this project's. With a
            :class:`~project.callbacks.feature_cache.FeatureCache`, the features are stored. The head is solved before
            training. With ``max_epochs=0``, the initial head is validated and saved. After training, the answers of the
            best checkpoint are calibrated.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shows_progress = kwargs.get("enable_progress_bar") is not False and not kwargs.get("barebones")
        kwargs["callbacks"] = _with_default_callbacks(kwargs.get("callbacks"), shows_progress)
        super().__init__(*args, **kwargs)
        lightning_internals.start_without_epochs(self)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # unless the user passed one
            self.strategy.checkpoint_io = AtomicCheckpointIO()


def _with_default_callbacks(
    user_callbacks: pl.Callback | list[pl.Callback] | None, shows_progress: bool
) -> list[pl.Callback]:
    """Add this project's callbacks to the user's, in a new list, as Lightning extends it."""
    callbacks = [user_callbacks] if isinstance(user_callbacks, pl.Callback) else [*(user_callbacks or [])]
    if shows_progress and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(FitProgressBar())
    finders = [callback for callback in callbacks if isinstance(callback, LearningRateFinder)]
    callbacks = [callback for callback in callbacks if callback not in finders]
    callbacks.append(Interpolation())
    callbacks.append(AnswerCalibration())  # after the interpolation, which changes the weights of best.ckpt
    callbacks.append(SolvedHead())  # after others, as it runs a validation when training starts
    return [ExactResume(), StagedUnfreezing(), *callbacks, *finders]  # a finder starts from the solved head
