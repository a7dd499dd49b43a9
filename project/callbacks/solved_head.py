"""The solved head: training starts from the best head that can be computed from the features of the training images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch import nn

from project.callbacks.head_obstacles import find_obstacle, memory_budget, refuse, refuse_settings_of_training
from project.callbacks.held_out_predictions import out_of_fold_images
from project.callbacks.model_checkpoint import BestCheckpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.evaluation.answers.held_out import FEW_IMAGES, HeldOutImages
from project.features.computed_features import ComputedFeatures, compute_features
from project.features.feature_reader import FeatureReader
from project.features.head_fitting import call_fit, solve_linear_head
from project.features.row_loader import RowLoader
from project.models.head_solver import FOLDS, HeadSolution, solver_device, standard_error
from project.models.heads import FittedHead
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.distributed import ProcessGroup
from project.runtime.logger_adapters import log_text


class SolvedHead(pl.Callback):
    """Before a fit, computes the head from features of the training images, and validates it as epoch 0.

    A linear head is solved, see :func:`~project.models.head_solver.solve_head`, and ``head_init`` of
    :class:`~project.classifier.ImageClassifier`. A :class:`~project.models.heads.FittedHead` computes itself.
    Validation images are not used: the penalty is chosen by cross-validation within the training images. A resumed fit
    keeps the head of its checkpoint.

    The features are stored rows, refined by the initial weights of the trainable stages. If no rows are stored, the
    features are computed once, without augmentation. Fine-tuning thus starts from a head that fits the pretrained
    features, which distorts them less than a random head does: LP-FT of Kumar et al., "Fine-Tuning can Distort
    Pretrained Features and Underperform Out-of-Distribution", ICLR 2022, arXiv:2202.10054.

    A head that is not random, because it was computed, loaded or trained before, is validated as epoch 0. The best
    checkpoint is therefore never worse on the validation images than this head.

    If there is nothing to train, because the head has no parameters, the fit has no epochs.
    """

    def __init__(self) -> None:
        #: How the head was computed; ``None`` for a random head.
        self.method: str | None = None
        #: Out-of-fold predictions of training images; ``None`` if the head was not solved in this process, or if there
        #: are enough validation images.
        self.out_of_fold: HeldOutImages | None = None
        self._unvalidated = False  # whether epoch 0 has not been validated yet

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not pl_module.trains_head:
            refuse_settings_of_training(pl_module, data)
            if trainer.ckpt_path is not None:
                raise ConfigError(
                    f"--ckpt_path: {type(pl_module.head).__name__} is computed and not trained, so there is nothing to "
                    "resume. Start a new fit without --ckpt_path; stored features are reused."
                )
            if trainer.max_epochs:
                lightning_internals.run_no_epochs(trainer)
                print_rank_zero(
                    f"Epochs: none, because {type(pl_module.head).__name__} has no parameters to train; "
                    "trainer.max_epochs, model.optimizer and model.scheduler have no effect"
                )
        self.out_of_fold = None
        if trainer.ckpt_path is None:
            self.method, self._unvalidated = None, pl_module.start is not None or not pl_module.head_is_new
            if pl_module.hparams["head_init"] != "random":
                self._compute(trainer, pl_module, data)

    def _compute(self, trainer: pl.Trainer, module: ImageClassifier, data: Any) -> None:
        obstacle = find_obstacle(trainer, module, data)
        if obstacle is not None:
            refuse(trainer, module, obstacle)
            print_rank_zero(f"Head: not solved, because {obstacle.reason}")
            return
        with _feature_reader(trainer, module, data) as reader:
            start = time.perf_counter()  # computing the features is logged on its own
            if isinstance(module.head, FittedHead):
                call_fit(module.head, reader)
                rows = f"{len(reader):,} rows of {len(data.splits['train']):,} training images"
                self.method = f"{type(module.head).__name__} computed from {rows}"
                print_rank_zero(f"Head: computed in {time.perf_counter() - start:.1f} s from {rows}")
            else:
                assert isinstance(module.head, nn.Linear)
                folds = _folds(data)
                solution, choice = solve_linear_head(
                    module.head,
                    reader,
                    folds,
                    module.task,
                    _target_weights(module, data, reader),
                    memory_budget(trainer, data)[1],
                    module.hparams["head_init"] == "solved_1se",
                    _calibrates_answers(trainer, data),
                )
                self.method = f"solved by {choice}"
                seconds, count = time.perf_counter() - start, len(data.splits["train"])
                print_rank_zero(f"Head: solved in {seconds:.1f} s on {count:,} training images: {choice}")
                _report(trainer, solution)
                if solution.out_of_fold is not None:
                    self.out_of_fold = out_of_fold_images(reader, folds, solution.out_of_fold, module.task)
        self._unvalidated = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        is_only_validation = trainer.max_epochs == 0
        before_training = not lightning_internals.epochs(trainer).ready
        if (self._unvalidated or is_only_validation) and trainer.enable_validation and before_training:
            lightning_internals.validate_before_training(trainer)
            names = ("val/accuracy", "val/loss")
            values = [f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in names]
            print_rank_zero(f"Epoch 0, {self._described(pl_module)}: {', '.join(values)}")
        self._unvalidated = False

    def _described(self, module: ImageClassifier) -> str:
        if self.method is None:
            return "the initial head" if module.start is None else f"the weights of {module.start}"
        head = module.head
        return f"the computed {type(head).__name__}" if isinstance(head, FittedHead) else "the solved head"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._unvalidated = False  # before best.ckpt is saved

    def state_dict(self) -> dict[str, Any]:
        """How the head was computed, and whether epoch 0 is still to be validated."""
        return {"method": self.method, "unvalidated": self._unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the description, and validate epoch 0 if the fit was interrupted in that validation."""
        method = state_dict.get("method")
        self.method = None if method is None else str(method)
        self._unvalidated = bool(state_dict["unvalidated"])


def _calibrates_answers(trainer: pl.Trainer, data: ImageDataModule) -> bool:
    """Whether out-of-fold predictions may calibrate the answers, because the validation images are few."""
    writes = lightning_internals.find_callback(trainer, BestCheckpoint) is not None
    reads_all = data.loaders["train"].rows is not None or ProcessGroup().size == 1
    return writes and reads_all and len(data.splits["val"]) < FEW_IMAGES


def _folds(data: ImageDataModule) -> torch.Tensor:
    """Fold of each training image. Rank zero first, as it reads images that are not indexed yet."""
    ranks, folds = ProcessGroup(), torch.empty(0)
    for is_turn_of_rank_zero in (True, False):
        with ranks.propagate_errors():
            if (ranks.rank == 0) == is_turn_of_rank_zero:
                folds = data.training_folds(FOLDS)
    return folds


@contextmanager
def _feature_reader(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> Iterator[FeatureReader]:
    stored, was_training, device = data.loaders["train"].rows, module.training, trainer.strategy.root_device
    module.eval()
    try:
        if isinstance(stored, RowLoader):
            yield FeatureReader(stored, module.refine, device, module.backbone.mean.dtype)
        else:
            computed = _compute_features(trainer, module, data)
            yield FeatureReader(computed, lambda features: features, computed.features.device, torch.float32)
    finally:
        module.train(was_training)


def _compute_features(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> ComputedFeatures:
    """Compute the features of this rank's part of the training images; of all images for a head that fits itself."""
    start, ranks, device = time.perf_counter(), ProcessGroup(), trainer.strategy.root_device
    count, width = len(data.splits["train"]), module.backbone.feature_dim
    part = ranks.rank_slice(count)

    def extract(images: torch.Tensor) -> torch.Tensor:
        with trainer.precision_plugin.forward_context():
            return module.refine(module.encode(images))

    with progress_counter("Head: features", ranks.rank == 0) as on_progress, ranks.propagate_errors():
        features = compute_features(
            data.training_images(part),
            extract,
            width,
            device,
            solver_device(device),
            lambda done: on_progress(done, part.stop - part.start),
        )
    if isinstance(module.head, FittedHead) and ranks.size > 1:
        features, part = torch.cat(ranks.gather(features.cpu())).to(features.device), slice(0, count)
    seconds = time.perf_counter() - start
    print_rank_zero(
        f"Head: features of {count:,} training images computed once in {seconds:.1f} s ({count / seconds:,.0f} "
        f"images/s), because none are stored; {count * width * 4 / 1e6:,.1f} MB in memory"
    )
    return ComputedFeatures(features, data.training_labels, part.start)


def _target_weights(
    module: ImageClassifier, data: ImageDataModule, reader: FeatureReader
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Maps labels ``(B,)`` of rows to target weights ``(B, C)``. All views of an image together count as one image."""
    smoothing, weights = module.hparams["label_smoothing"], module.loss_weights
    weights = None if weights is None else weights.to(reader.device)
    draws = data.class_balance.draws.to(reader.device)

    def targets(labels: torch.Tensor) -> torch.Tensor:
        target_weights = module.task.target_weights(labels, len(module.classes), weights, smoothing)
        return target_weights * (draws[labels] / reader.rows.view_count)[:, None]

    return targets


def _report(trainer: pl.Trainer, solution: HeadSolution) -> None:
    """Print and log the penalties that were compared."""
    unfinished = [f"{score.penalty:.4g}" for score in solution.scores if not score.converged]
    if not solution.converged:
        print_rank_zero(f"Head: the solver has not converged; the largest gradient is {solution.gradient_norm:.1e}")
    if unfinished:
        print_rank_zero(f"Head: cross-validation has not converged for the penalties {', '.join(unfinished)}")
    if not solution.scores:
        return
    names = ("penalty", "accuracy", "standard error", "loss", "standard error")
    table = Table(box=None)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    lines = [f"| {' | '.join(names)} | |", "|---:|---:|---:|---:|---:|---|"]
    for score in solution.scores:
        cells = [
            f"{score.penalty:.4g}",
            *(
                f"{value:.4f}"
                for scores in (score.accuracies, score.losses)
                for value in (float(scores.nanmean()), standard_error(scores))
            ),
            "chosen" if score is solution.chosen else "",
        ]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    print_rank_zero(table)
    log_text(trainer, "head", "\n".join([*lines, "", f"largest gradient: {solution.gradient_norm:.1e}"]))
