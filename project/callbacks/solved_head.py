"""The solved head: training starts from the best linear head of the stored features."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

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
from project.models.lbfgs import HISTORY
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup
from project.runtime.logger_adapters import log_text

FOLDS = 5
COPIES = 4  # of the features that the solver holds in memory at once
#: Images x classes x features that cross-validation takes at most: with more, a sample of the images chooses.
MAX_WORK = {"cpu": 2**31, "cuda": 2**36}
MIN_SAMPLE = 1000  # images


class Choice(NamedTuple):
    """How the penalty of a solved head was chosen.

    Attributes:
        penalty: L2 penalty.
        folds: Number of cross-validation folds.
        sample: Number of images that were used; 0 for all training images.
    """

    penalty: float
    folds: int
    sample: int

    def __str__(self) -> str:
        sample = f" on a sample of {self.sample:,} images" if self.sample else ""
        return (
            f"logistic regression with L2 penalty {self.penalty:.3g}, chosen by {self.folds}-fold "
            f"cross-validation{sample}"
        )


class SolvedHead(pl.Callback):
    """Before a fit, sets the head to the best linear head of the stored training rows, and validates it as epoch 0.

    See :func:`~project.models.head_solver.solve_head`, and ``head_init`` of
    :class:`~project.classifier.ImageClassifier`. Validation images are not used: the penalty is chosen by
    cross-validation within the training images. A resumed fit keeps the head of its checkpoint.
    """

    def __init__(self) -> None:
        #: How the head was solved; ``None`` for a random head.
        self.choice: Choice | None = None
        self._unvalidated = False  # whether the solved head has not been validated yet

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            return
        self.choice, self._unvalidated = None, False
        if not isinstance(pl_module, ImageClassifier) or pl_module.hparams["head_init"] == "random":
            return
        data: Any = getattr(trainer, "datamodule", None)
        start, reason = time.perf_counter(), _obstacle(trainer, pl_module, data)
        if reason is None:
            folds = _folds(data)
            if int(folds.max()) == 0:
                reason = "all training images are near-duplicates or of one group"
        if reason is not None:
            if pl_module.hparams["head_init"] != "auto" and not getattr(trainer, "fast_dev_run", False):
                raise ConfigError(
                    f"model.head_init: the head cannot be solved, because {reason}. Use --model.head_init auto."
                )
            print_rank_zero(f"Head: not solved, because {reason}")
            return
        solution, sample = _solve(trainer, pl_module, data, folds)
        with torch.no_grad():
            for parameter, value in ((pl_module.head.weight, solution.weight), (pl_module.head.bias, solution.bias)):
                if value is not None:
                    assert isinstance(parameter, torch.Tensor)
                    parameter.copy_(value)
                    _from_rank_zero(parameter.data)
        self.choice = Choice(solution.chosen.penalty, int(folds.max()) + 1, sample)
        self._unvalidated = True
        seconds = time.perf_counter() - start
        print_rank_zero(f"Head: solved in {seconds:.1f} s on {len(folds):,} training images: {self.choice}")
        _report(trainer, solution)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._unvalidated and trainer.enable_validation and not lightning_internals.epochs(trainer).ready:
            lightning_internals.validate_before_training(trainer)
            names = ("val/accuracy", "val/loss")
            values = [f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in names]
            print_rank_zero(f"Epoch 0, the solved head: {', '.join(values)}")
        self._unvalidated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._unvalidated = False  # before best.ckpt is saved

    def state_dict(self) -> dict[str, Any]:
        """How the head was solved, and whether epoch 0 is still to be validated."""
        return {"choice": None if self.choice is None else [*self.choice], "unvalidated": self._unvalidated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the description, and validate epoch 0 if the fit was interrupted in that validation."""
        choice = state_dict["choice"]
        self.choice = None if choice is None else Choice(float(choice[0]), int(choice[1]), int(choice[2]))
        self._unvalidated = bool(state_dict["unvalidated"])


def _obstacle(trainer: pl.Trainer, module: ImageClassifier, data: Any) -> str | None:
    """Why the head cannot be solved; ``None`` if it can."""
    if not isinstance(module.head, nn.Linear):
        return f"{type(module.head).__name__} is not linear"
    if not module.head_is_new and module.hparams["head_init"] == "auto":
        return "it is trained already"
    if not isinstance(data, ImageDataModule) or data.loaders["train"].rows is None:
        return "no features are stored"
    limit = trainer.limit_train_batches
    if trainer.overfit_batches or isinstance(limit, int) or limit < 1:  # type: ignore[attr-defined]
        return "trainer.limit_train_batches or overfit_batches leaves out training images"
    budget, _ = _budget(trainer)
    values = len(module.classes) * module.backbone.feature_dim
    if FOLDS * (2 * HISTORY + 3) * values * 4 > budget:
        return f"{FOLDS} heads of {len(module.classes):,} classes exceed the memory"
    if module.cut.trainable and len(data.splits["train"]) > _budget(trainer)[1] // module.backbone.feature_dim:
        return "the features do not fit in memory, and the trainable stages would compute them in every pass"
    return None


def _budget(trainer: pl.Trainer) -> tuple[int, int]:
    """Bytes for the solver, and the number of feature values that all ranks can hold; equal on all ranks."""
    ranks = ProcessGroup()
    budget = min(ranks.gather(row_memory_budget(trainer.strategy.root_device, trainer.num_devices)))
    return budget, budget // (4 * COPIES) * ranks.size


def _folds(data: ImageDataModule) -> torch.Tensor:
    """Fold of each training image. Rank zero first, as it reads images that are not indexed yet."""
    ranks, folds = ProcessGroup(), torch.empty(0)
    for is_turn_of_rank_zero in (True, False):
        with ranks.propagate_errors():
            if (ranks.rank == 0) == is_turn_of_rank_zero:
                folds = data.training_folds(FOLDS)
    return folds


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def _from_rank_zero(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of rank zero: ranks may have different processors, which round differently."""
    if ProcessGroup().size > 1:
        dist.broadcast(tensor, 0)
    return tensor


def _solve(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, folds: torch.Tensor
) -> tuple[HeadSolution, int]:
    """Solve the head; returns it and the number of images that have chosen its penalty, 0 for all."""
    loader, ranks = data.loaders["train"].rows, ProcessGroup()
    assert isinstance(loader, RowLoader)
    model_device = trainer.strategy.root_device
    device = torch.device("cpu") if model_device.type == "mps" else model_device  # MPS has no float64
    count, views, width = len(folds), loader.view_count, module.backbone.feature_dim
    classes, smoothing, weights = len(module.classes), module.hparams["label_smoothing"], module.loss_weights
    weights = None if weights is None else weights.to(device)
    frequency = torch.ones(classes, device=device)  # how often an epoch draws an image of a class
    if data.balance == "sampler":
        counts = torch.tensor(data.class_counts["train"], dtype=torch.float32, device=device)
        frequency = count / (classes * counts)

    def targets(labels: torch.Tensor) -> torch.Tensor:
        target_weights = module.task.target_weights(labels, classes, weights, smoothing)
        return target_weights * (frequency[labels] / views)[:, None]

    @torch.no_grad()
    def features(indices: torch.Tensor) -> torch.Tensor:
        """Features of rows, by index: the trainable stages, if there are any, run in small batches."""
        batches = (loader.read(part).to(model_device) for part in torch.split(indices, loader.evaluation_batch_size))
        parts = [module.refine(rows.to(module.backbone.mean.dtype)).float().to(device) for rows in batches]
        return torch.cat(parts)

    def training_rows(images: torch.Tensor, in_memory: bool) -> TrainingRows:
        share = ranks.rank_slice(len(images) * views)
        numbers = torch.arange(share.start, share.stop)
        own = images[numbers % len(images)]
        indices, kept = own + numbers // len(images) * count, None
        if in_memory:
            with ranks.propagate_errors():
                kept = features(indices)
        return TrainingRows(
            (lambda part: features(indices[part])) if kept is None else kept.__getitem__,
            loader.labels[own].to(device),
            folds[own].to(device),
            targets,
            in_memory,
            _sum_over_ranks if ranks.size > 1 else None,
            _from_rank_zero if ranks.size > 1 else None,
        )

    fitting = _budget(trainer)[1] // (views * width)  # images whose features fit in memory
    quick = MAX_WORK.get(device.type, MAX_WORK["cpu"]) * ranks.size // (views * width * classes)
    everything, most = torch.arange(count), max(min(fitting, quick), MIN_SAMPLE)
    sample = None
    if count > most:
        sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
    was_training = module.training
    module.eval()
    try:
        solution = solve_head(
            training_rows(everything, count <= max(fitting, MIN_SAMPLE)),
            module.task,
            classes,
            int(folds.max()) + 1,
            module.head.bias is not None,
            module.hparams["head_init"] == "solved_1se",
            None if sample is None else training_rows(sample, True),
        )
    finally:
        module.train(was_training)
    return solution, 0 if sample is None else len(sample)


def _report(trainer: pl.Trainer, solution: HeadSolution) -> None:
    """Print and log the penalties that were compared."""
    unfinished = [f"{score.penalty:.4g}" for score in solution.scores if not score.converged]
    if not solution.converged:
        print_rank_zero(f"Head: the solver has not converged; the largest gradient is {solution.gradient_norm:.1e}")
    if unfinished:
        print_rank_zero(f"Head: cross-validation has not converged for the penalties {', '.join(unfinished)}")
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
