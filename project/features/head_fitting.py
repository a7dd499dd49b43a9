"""Fits a head to the features of the training images, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from project.features.feature_reader import FeatureReader
from project.models.head_bank import TrainingRows
from project.models.head_solver import HeadSolution, solve_head
from project.models.heads import FittedHead
from project.runtime.console import progress_counter
from project.runtime.distributed import ProcessGroup
from project.task import Task

#: Images x classes x features that cross-validation takes at most: with more, a sample of the images chooses.
MAX_WORK = {"cpu": 2**31, "cuda": 2**36}
MIN_SAMPLE = 1000  # images


class PenaltyChoice(NamedTuple):
    """How the penalty of a solved head was chosen.

    Attributes:
        penalty: L2 penalty.
        folds: Number of cross-validation folds; 0 if nothing could be held out, so that the penalty is fixed.
        sample: Number of images that were used; 0 for all training images.
    """

    penalty: float
    folds: int
    sample: int

    def __str__(self) -> str:
        if not self.folds:
            return (
                f"logistic regression with L2 penalty {self.penalty:.3g}, fixed, because no class has two images to "
                "cross-validate with (near-duplicates and images of one group count as one)"
            )
        sample = f" on a sample of {self.sample:,} images" if self.sample else ""
        return (
            f"logistic regression with L2 penalty {self.penalty:.3g}, chosen by {self.folds}-fold "
            f"cross-validation{sample}"
        )


def call_fit(head: FittedHead, reader: FeatureReader) -> None:
    """Call the head's own ``fit``. Collective: each rank reads all rows, and all get the head of rank zero.

    Args:
        head: The head, whose state is replaced.
        reader: Reads the features of all training rows.

    Raises:
        ProjectError: ``fit`` has failed on a rank.
    """
    with ProcessGroup().propagate_errors():
        head.fit(reader)
    assert isinstance(head, nn.Module)
    for tensor in head.state_dict().values():
        _from_rank_zero(tensor)


def solve_linear_head(
    head: nn.Linear,
    reader: FeatureReader,
    folds: torch.Tensor,
    task: Task,
    targets: Callable[[torch.Tensor], torch.Tensor],
    values_in_memory: int,
    one_standard_error: bool = False,
    out_of_fold: bool = False,
) -> tuple[HeadSolution, PenaltyChoice]:
    """Find the best linear head, and set its parameters; see :func:`~project.models.head_solver.solve_head`.

    Each rank reads its part of the rows. Collective: all ranks must call it.

    Args:
        head: The head ``(D, C)``.
        reader: Reads the features of the training rows: V views of N images.
        folds: Cross-validation fold of each image, int64 ``(N,)``; negative for images that are never held out.
        task: Gives the loss.
        targets: Maps labels ``(B,)`` of rows to target weights ``(B, C)``, on the device of the reader; see
            :meth:`~project.task.Task.target_weights`.
        values_in_memory: Number of feature values that all ranks can hold.
        one_standard_error: Choose the strongest penalty within one standard error of the best.
        out_of_fold: Whether to compute out-of-fold logits, too. Those of the solution are of the first view of all
            images, ``(N, C)``, on the CPU, on all ranks.
    """
    ranks, device = ProcessGroup(), reader.device
    count, views, width, classes = len(folds), reader.rows.view_count, head.in_features, head.out_features

    def training_rows(images: torch.Tensor, in_memory: bool) -> TrainingRows:
        """This rank's rows of images, bool ``(N,)``: its part of all rows, of which it may hold only these."""
        share = ranks.rank_slice(count * views)
        indices = torch.arange(share.start, share.stop)
        indices = indices[images[indices % count]]
        own, kept = indices % count, None
        if in_memory:
            with ranks.propagate_errors():
                kept = reader.read(indices)
        return TrainingRows(
            (lambda part: reader.read(indices[part])) if kept is None else kept.__getitem__,
            reader.rows.labels[own].to(device),
            folds[own].to(device),
            targets,
            in_memory,
            _sum_over_ranks if ranks.size > 1 else None,
            _from_rank_zero if ranks.size > 1 else None,
        )

    fitting = values_in_memory // (views * width)  # images whose features fit in memory
    quick = MAX_WORK.get(device.type, MAX_WORK["cpu"]) * ranks.size // (views * width * classes)
    most, sample = max(min(fitting, quick), MIN_SAMPLE), None
    if count > most:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
        sample = torch.zeros(count, dtype=torch.bool).index_fill(0, drawn, True)
    fold_count = int(folds.max()) + 1
    with progress_counter("Head", ranks.rank == 0) as on_progress:
        solution = solve_head(
            training_rows(torch.ones(count, dtype=torch.bool), count <= max(fitting, MIN_SAMPLE)),
            task,
            classes,
            fold_count,
            head.bias is not None,
            one_standard_error,
            None if sample is None else training_rows(sample, True),
            on_progress,
            out_of_fold=out_of_fold,
        )
    if solution.out_of_fold is not None:  # each rank has a part of the rows; those of the first view come first
        logits = torch.cat(ranks.gather(solution.out_of_fold.cpu()))[:count]
        solution = solution._replace(out_of_fold=logits)
    for parameter, value in ((head.weight, solution.weight), (head.bias, solution.bias)):
        if value is not None:
            parameter.data.copy_(value)
            _from_rank_zero(parameter.data)
    choice = PenaltyChoice(solution.penalty, fold_count if fold_count > 1 else 0, 0 if sample is None else most)
    return solution, choice


def _sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def _from_rank_zero(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of rank zero: ranks may have different processors, which round differently."""
    if ProcessGroup().size > 1:
        dist.broadcast(tensor, 0)
    return tensor
