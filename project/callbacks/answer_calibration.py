"""After a fit, calibrates the answers of its best checkpoint."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from project.callbacks.held_out_predictions import stored_rows, validation_images
from project.callbacks.model_checkpoint import BestCheckpoint
from project.callbacks.solved_head import SolvedHead
from project.checkpoints.trained_part import Tensors, other_weights, read_on_rank_zero
from project.classifier import ImageClassifier
from project.evaluation.answers.calibration import KEY, MIN_IMAGES, Answers
from project.evaluation.answers.held_out import HeldOutImages, combine
from project.evaluation.validation_data import validation_module
from project.models.backbone import stage_prefix
from project.models.pretrained import pretrained_stages
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup


class AnswerCalibration(pl.Callback):
    """Calibrates the answers of ``best.ckpt`` at the end of a fit, and adds them to this file.

    The weights of ``best.ckpt`` predict the validation images once more. If these are few, and the checkpoint has the
    solved head, out-of-fold predictions of the training images are added, see :class:`SolvedHead`.

    Attributes:
        answers: Result of the fit, on rank zero; ``None`` before it ends, or if nothing was calibrated.
        note: Why out-of-fold predictions are not used, a clause; empty if they are, or are not needed.
    """

    def __init__(self) -> None:
        self.answers: Answers | None = None
        self.note = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.answers, self.note = None, ""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        best = lightning_internals.find_callback(trainer, BestCheckpoint)
        if best is None or not best.best_model_path or not isinstance(pl_module, ImageClassifier):
            return
        checkpoint = read_on_rank_zero(best.best_model_path, "state_dict", KEY)
        if KEY in checkpoint:  # the fit had ended before, and no epoch of this run is better
            self.answers = Answers.from_state(checkpoint[KEY], len(pl_module.classes), pl_module.backbone.feature_dim)
            return
        reason = self._calibrate(trainer, pl_module, best, checkpoint)
        if reason is not None:
            print_rank_zero(f"Answers: not calibrated, because {reason}")

    def _calibrate(
        self, trainer: pl.Trainer, module: ImageClassifier, best: BestCheckpoint, checkpoint: dict[str, Any]
    ) -> str | None:
        """Calibrate the answers, and write them. Returns why they cannot be; ``None`` if they are."""
        data, start = validation_module(trainer), time.perf_counter()
        if data is None:
            return "the validation images do not come from an ImageDataModule"
        if not lightning_internals.load_validation_batches(trainer):
            return "trainer.limit_val_batches is 0"
        weights = _weights_of(module, checkpoint["state_dict"])
        if weights is None:
            return "the best epoch has trained other parts of the network than the last one"
        with other_weights(weights, module.trained_tensors()):
            with ProcessGroup().propagate_errors():
                rows = stored_rows(trainer, module, data)
            validation = validation_images(trainer, module, data, rows)
        if not np.isfinite(validation.probabilities).all() or not np.isfinite(validation.distances).all():
            return "the outputs of the network are not finite for all validation images"
        calibration = combine(validation, _out_of_fold(trainer, best))
        self.note = calibration.note
        if len(calibration.images) < MIN_IMAGES:
            return f"there are {len(calibration.images)} held-out images, and at least {MIN_IMAGES} are needed"
        if ProcessGroup().rank == 0:
            self.answers = Answers.fit(calibration, rows)
        best.write_answers(trainer, self.answers)
        added = f" and {calibration.out_of_fold:,} out-of-fold training images" if calibration.out_of_fold else ""
        print_rank_zero(
            f"Answers: calibrated in {time.perf_counter() - start:.1f} s on {calibration.validation:,} validation"
            f"{added or ' images'}{f'; {self.note}' if self.note else ''}"
        )
        return None


def _out_of_fold(trainer: pl.Trainer, best: BestCheckpoint) -> HeldOutImages | None:
    """Out-of-fold predictions, if ``best.ckpt`` has the head that was solved in this fit."""
    solved, evaluation = lightning_internals.find_callback(trainer, SolvedHead), best.evaluation
    if solved is None or evaluation is None or evaluation.epoch != -1 or evaluation.interpolated is not None:
        return None
    return solved.out_of_fold


def _weights_of(module: ImageClassifier, saved: Tensors) -> Tensors | None:
    """The trained part of a checkpoint, as the module has it; ``None`` if one has tensors that the other one lacks.

    With a schedule, a checkpoint of an early epoch lacks the stages that were still frozen: these were pretrained.
    """
    expected = module.trained_tensors()
    stages = [name for name in module.cut.trainable if not any(key.startswith(stage_prefix(name)) for key in saved)]
    pretrained = {
        f"{stage_prefix(name)}{key}": tensor
        for name, stage in (pretrained_stages(module.backbone, stages) or {} if stages else {}).items()
        for key, tensor in stage.state_dict().items()
    }
    weights: dict[str, torch.Tensor] = {**pretrained, **saved}
    if not saved.keys() <= expected.keys() <= weights.keys():
        return None
    return {name: weights[name] for name in expected}
