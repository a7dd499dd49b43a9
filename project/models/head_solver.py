"""The best linear head of given rows: logistic regression with the L2 penalty that cross-validation chooses.

The heads of all folds are solved together, from the strongest penalty to the weakest, each penalty from the solution of
the previous ones (Friedman et al., "Regularization paths for generalized linear models via coordinate descent", 2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from project.models.head_bank import NO_FOLD, Coordinates, HeadBank, TrainingRows
from project.task import Task

FOLDS = 5  # of cross-validation
COPIES = 4  # of the features in memory at once, those that are read included
#: The first penalties to compare, the strongest first: 1 / C of scikit-learn.
PENALTIES = tuple(10 ** (4 - 5 * index / 9) for index in range(10))
RATIO = PENALTIES[0] / PENALTIES[1]
#: More penalties follow while the outermost one has the smallest loss, by at least this difference.
MIN_GAIN = 1e-3
MAX_PENALTIES = 20
#: The penalty where nothing can be held out: scikit-learn's default.
FIXED_PENALTY = 1.0
#: Relative tolerances of the loss: in cross-validation, and of the final head.
COARSE, FINE = 1e-5, 1e-8


@dataclass(frozen=True)
class PenaltyScore:
    """Cross-validation of one penalty.

    Attributes:
        penalty: L2 penalty, 1 / C of scikit-learn.
        losses: Mean loss of each held-out fold, float64 ``(F,)``.
        accuracies: Accuracy of each held-out fold, float64 ``(F,)``.
        mean_head: Mean parameters of the heads of all folds, float32 ``(C, R)``; see
            :class:`~project.models.head_bank.Coordinates`.
        converged: Whether the heads of all folds have converged.
    """

    penalty: float
    losses: torch.Tensor
    accuracies: torch.Tensor
    mean_head: torch.Tensor
    converged: bool

    @property
    def loss(self) -> float:
        """Mean loss over the folds; folds whose rows have no weight do not count."""
        return float(self.losses.nanmean())


class HeadSolution(NamedTuple):
    """The best linear head.

    Attributes:
        weight: ``(C, D)``, float32.
        bias: ``(C,)``, float32; ``None`` without a bias.
        penalty: L2 penalty of the head.
        scores: Cross-validation of each penalty, the strongest first; empty for a fixed penalty.
        chosen: The one of :attr:`penalty`; ``None`` for a fixed penalty.
        gradient_norm: Largest component of the gradient of the mean loss with its penalty, computed in float64.
        converged: Whether the solver has converged for the head.
        out_of_fold: Logits of each training row by a head with this penalty that was trained on the other folds,
            float32 ``(N, C)``; ``None`` if they were not requested, or if there are no folds.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    penalty: float
    scores: list[PenaltyScore]
    chosen: PenaltyScore | None
    gradient_norm: float
    converged: bool
    out_of_fold: torch.Tensor | None = None


def solve_head(
    rows: TrainingRows,
    task: Task,
    classes: int,
    folds: int,
    bias: bool = True,
    one_standard_error: bool = False,
    sample: TrainingRows | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    out_of_fold: bool = False,
) -> HeadSolution:
    """Find the best linear head of the training rows.

    Args:
        rows: The training rows.
        task: Gives the loss, which must be convex in the logits.
        classes: Number C of classes.
        folds: Number of cross-validation folds; with less than 2, the penalty is :data:`FIXED_PENALTY`.
        bias: Whether the head has a bias.
        one_standard_error: Choose the strongest penalty whose loss is within one standard error of the smallest loss
            (Hastie et al., "The Elements of Statistical Learning", 2009, section 7.10), not that of the smallest loss.
        sample: A sample of the rows that fits in memory, to choose the penalty with; by default all rows.
        on_progress: Called with the number of solved problems and the expected total: penalties and the final head.
        out_of_fold: Whether to compute out-of-fold logits, too. With a sample, there are none.
    """
    compared = rows if sample is None else sample
    coordinates = Coordinates(compared, bias)
    scores = cross_validate(compared, coordinates, task, classes, folds, on_progress) if folds > 1 else []
    chosen = min(scores, key=lambda score: score.loss, default=None)
    if one_standard_error and chosen is not None:
        limit = chosen.loss + standard_error(chosen.losses)
        chosen = next(score for score in scores if score.loss <= limit)
    penalty, start = (FIXED_PENALTY, None) if chosen is None else (chosen.penalty, chosen.mean_head)
    held_out = None
    if out_of_fold and sample is None and start is not None:
        bank = HeadBank(rows, coordinates, torch.arange(folds, device=rows.labels.device), task, classes)
        heads = bank.solve(start.expand(folds, *start.shape).clone(), penalty, COARSE).parameters
        held_out = bank.held_out_logits(heads)
    if sample is not None:
        on_sample = None if start is None else coordinates.head(start)
        coordinates = Coordinates(rows, bias)
        start = None if on_sample is None else coordinates.parameters(*on_sample)
    final = HeadBank(rows, coordinates, torch.tensor([NO_FOLD], device=rows.labels.device), task, classes)
    solution = final.solve(final.zeros() if start is None else start[None], penalty, FINE)
    on_progress(len(scores) + 1, len(scores) + 1)
    weight, offset = coordinates.head(solution.parameters[0])
    norm = final.gradient_norm(solution.parameters, penalty)
    return HeadSolution(weight, offset, penalty, scores, chosen, norm, bool(solution.converged.all()), held_out)


def solver_device(device: torch.device) -> torch.device:
    """Device to solve heads on, given that of the features: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def standard_error(scores: torch.Tensor) -> float:
    """Standard error of the mean of the folds' scores ``(F,)``."""
    valid = scores[~scores.isnan()]
    return float(valid.std() / math.sqrt(len(valid)))


def cross_validate(
    rows: TrainingRows,
    coordinates: Coordinates,
    task: Task,
    classes: int,
    folds: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PenaltyScore]:
    """Score the penalties; see :data:`PENALTIES` and :data:`MIN_GAIN`.

    Args:
        rows: The training rows.
        coordinates: Their coordinates.
        task: Gives the loss, which must be convex in the logits.
        classes: Number C of classes.
        folds: Number of folds, at least 2.
        on_progress: Called with the number of scored penalties, and their expected number plus 1.

    Returns:
        The scores, the strongest penalty first.
    """
    bank = HeadBank(rows, coordinates, torch.arange(folds, device=rows.labels.device), task, classes)
    scores: list[PenaltyScore] = []
    first, before, last = (bank.zeros(),) * 3  # heads of all folds ``(F, C, R)``, of these penalties only

    def score(start: torch.Tensor, penalty: float) -> tuple[torch.Tensor, PenaltyScore]:
        solution = bank.solve(start, penalty, COARSE)
        heads, converged = solution.parameters, bool(solution.converged.all())
        done = len(scores) + 1
        on_progress(done, max(done, len(PENALTIES)) + 1)
        return heads, PenaltyScore(penalty, *bank.held_out_scores(heads), heads.mean(0), converged)

    def is_clearly_best(outermost: PenaltyScore) -> bool:
        others = [other.loss for other in scores if other is not outermost]
        return len(scores) < MAX_PENALTIES and min(others) - outermost.loss > MIN_GAIN

    while len(scores) < len(PENALTIES) or is_clearly_best(scores[-1]):
        # The line through the last two solutions leads close to the next one: a third of the passes remains.
        start = 2 * last - before if len(scores) > 1 else last
        heads, added = score(start, scores[-1].penalty / RATIO if scores else PENALTIES[0])
        first, before, last = heads if not scores else first, last, heads
        scores.append(added)
    while is_clearly_best(scores[0]):
        first, added = score(first, scores[0].penalty * RATIO)
        scores.insert(0, added)
    return scores
