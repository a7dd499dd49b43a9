"""The solved head: training starts from the best linear head of the stored features."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.features.provider import row_memory_budget
from project.features.row_loader import RowLoader
from project.models.head_bank import TrainingRows
from project.models.head_solver import HeadSolution, solve_head, standard_error
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup, world_size
from project.runtime.logger_adapters import log_text

FOLDS = 5
COPIES = 4  # of the features that the solver holds in memory at once
MIN_SAMPLE = 1000  # images


class SolvedHead(pl.Callback):
    """Before a fit, sets the head to the best linear head of the stored training rows, and validates it as epoch 0.

    See :func:`~project.models.head_solver.solve_head`, and ``head_init`` of
    :class:`~project.classifier.ImageClassifier`. Validation images are not used: the penalty is chosen by
    cross-validation within the training images. A resumed fit keeps the head of its checkpoint.
    """

    def __init__(self) -> None:
        #: How the head was initialized; empty for a random head.
        self.description = ""
        self._unvalidated = False  # whether the solved head has not been validated yet

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier) or pl_module.hparams["head_init"] == "random":
            return
        if trainer.ckpt_path is not None:
            return
        data: Any = getattr(trainer, "datamodule", None)
        reason = _obstacle(trainer, pl_module, data)
        if reason is not None:
            if pl_module.hparams["head_init"] != "auto":
                raise ConfigError(f"model.head_init: the head cannot be solved, because {reason}. Use random.")
            print_rank_zero(f"Head: random, because {reason}")
            return
        start = time.perf_counter()
        folds = data.training_folds(FOLDS)
        if int(folds.max()) == 0:
            print_rank_zero("Head: random, because all training images are near-duplicates or of one group")
            return
        solution, compared = _solve(trainer, pl_module, data, folds)
        with torch.no_grad():
            for parameter, value in ((pl_module.head.weight, solution.weight), (pl_module.head.bias, solution.bias)):
                if value is not None:
                    assert isinstance(parameter, torch.Tensor)
                    parameter.copy_(value)
                    if world_size() > 1:  # ranks may have different processors
                        dist.broadcast(parameter.data, 0)
        self.description = _describe(solution, compared, len(folds))
        self._unvalidated = True
        seconds = time.perf_counter() - start
        print_rank_zero(f"Head: solved in {seconds:.1f} s on {len(folds):,} training images: {self.description}")
        _report(trainer, solution)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._unvalidated and trainer.enable_validation:
            lightning_internals.validate_before_training(trainer)
            names = ("val/accuracy", "val/loss")
            values = [f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in names]
            print_rank_zero(f"Epoch 0, the solved head: {', '.join(values)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._unvalidated = False  # before best.ckpt is saved

    def state_dict(self) -> dict[str, Any]:
        """How the head was initialized, and whether epoch 0 is still to be validated."""
        return {"description": self.description, "unvalidated": self._unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Validate epoch 0 if the fit was interrupted in that validation."""
        self.description = str(state_dict["description"])
        self._unvalidated = bool(state_dict["unvalidated"])


def _obstacle(trainer: pl.Trainer, module: ImageClassifier, data: Any) -> str | None:
    """Why the head cannot be solved; ``None`` if it can."""
    if not isinstance(module.head, nn.Linear):
        return f"{type(module.head).__name__} is not linear"
    if not isinstance(data, ImageDataModule) or data.loaders["train"].rows is None:
        return "no features are stored"
    if trainer.overfit_batches or trainer.limit_train_batches != 1.0:  # type: ignore[attr-defined]
        return "trainer.limit_train_batches or overfit_batches leaves out training images"
    return None


def _solve(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, folds: torch.Tensor
) -> tuple[HeadSolution, int]:
    """Solve the head; returns it and the number of images that have chosen its penalty."""
    loader, device, ranks = data.loaders["train"].rows, trainer.strategy.root_device, ProcessGroup()
    assert isinstance(loader, RowLoader)
    count, views, width = len(folds), loader.view_count, module.backbone.feature_dim
    classes, smoothing, weights = len(module.classes), module.hparams["label_smoothing"], module.loss_weights
    if data.balance == "sampler":  # as often as the sampler draws them
        counts = torch.tensor(data.class_counts["train"], dtype=torch.float32, device=device)
        weights = count / (classes * counts)

    def targets(labels: torch.Tensor) -> torch.Tensor:
        return module.task.target_weights(labels, classes, weights, smoothing) / views

    def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def features(indices: torch.Tensor) -> torch.Tensor:
        """Features of rows, by index: the trainable stages, if there are any, run in small batches."""
        batches = (loader.read(part).to(device) for part in torch.split(indices, loader.evaluation_batch_size))
        return torch.cat([module.refine(rows.to(module.backbone.mean.dtype)).float() for rows in batches])

    def training_rows(images: torch.Tensor, in_memory: bool) -> TrainingRows:
        share = ranks.rank_slice(len(images) * views)
        numbers = torch.arange(share.start, share.stop)
        own = images[numbers % len(images)]
        indices = own + numbers // len(images) * count
        kept = features(indices) if in_memory else None
        return TrainingRows(
            (lambda part: features(indices[part])) if kept is None else kept.__getitem__,
            loader.labels[own].to(device),
            folds[own].to(device),
            targets,
            in_memory,
            sum_over_ranks if ranks.size > 1 else None,
        )

    budget = row_memory_budget(device, trainer.num_devices) // COPIES
    most = max(budget * ranks.size // (views * width * 4), MIN_SAMPLE)
    everything, sample = torch.arange(count), None
    if count > most:
        sample = everything[:: -(-count // most)]  # over the whole split, which may be sorted by class
    was_training = module.training
    module.eval()
    try:
        solution = solve_head(
            training_rows(everything, sample is None),
            module.task,
            classes,
            int(folds.max()) + 1,
            module.head.bias is not None,
            module.hparams["head_init"] == "solved_1se",
            None if sample is None else training_rows(sample, True),
        )
    finally:
        module.train(was_training)
    return solution, count if sample is None else len(sample)


def _describe(solution: HeadSolution, compared: int, images: int) -> str:
    chosen = solution.chosen
    sample = "" if compared == images else f" on {compared:,} of them, as all exceed the memory"
    return (
        f"logistic regression with L2 penalty {chosen.penalty:.3g}, chosen by {len(chosen.losses)}-fold "
        f"cross-validation{sample}"
    )


def _report(trainer: pl.Trainer, solution: HeadSolution) -> None:
    """Print and log the penalties that were compared."""
    if not solution.converged:
        print_rank_zero(f"Head: the solver has not converged; the largest gradient is {solution.gradient_norm:.1e}")
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
                for value in (float(scores.mean()), standard_error(scores))
            ),
            "chosen" if score is solution.chosen else "",
        ]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    print_rank_zero(table)
    log_text(trainer, "head", "\n".join(lines))
