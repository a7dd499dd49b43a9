"""The best linear head of given rows: logistic regression with the L2 penalty that cross-validation chooses.

The heads of all folds are solved together, from the strongest penalty to the weakest, each penalty from the solution of
the previous ones (Friedman et al., "Regularization paths for generalized linear models via coordinate descent", 2010).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from project.models.head_bank import Coordinates, HeadBank, TrainingRows
from project.task import Task

#: The first penalties to compare, the strongest first: 1 / C of scikit-learn.
PENALTIES = tuple(10 ** (4 - 5 * index / 9) for index in range(10))
RATIO = PENALTIES[0] / PENALTIES[1]
#: More penalties follow while the outermost one has the smallest loss, by at least this difference.
MIN_GAIN = 1e-3
MAX_PENALTIES = 20
#: Relative tolerances of the loss: in cross-validation, and of the final head.
COARSE, FINE = 1e-5, 1e-8


@dataclass(frozen=True)
class PenaltyScore:
    """Cross-validation of one penalty.

    Attributes:
        penalty: L2 penalty, 1 / C of scikit-learn.
        losses: Mean loss of each held-out fold, float64 ``(F,)``.
        accuracies: Accuracy of each held-out fold, float64 ``(F,)``.
        heads: Parameters of the heads, one for each held-out fold.
        converged: Whether all of them have converged.
    """

    penalty: float
    losses: torch.Tensor
    accuracies: torch.Tensor
    heads: torch.Tensor
    converged: bool

    @classmethod
    def of(cls, bank: HeadBank, start: torch.Tensor, penalty: float) -> PenaltyScore:
        """Solve the heads of all folds, and score each on the fold that it does not train on."""
        solution = bank.solve(start, penalty, COARSE)
        losses, accuracies = bank.held_out_scores(solution.parameters)
        return cls(penalty, losses, accuracies, solution.parameters, bool(solution.converged.all()))

    @property
    def loss(self) -> float:
        """Mean loss over the folds; folds whose rows have no weight do not count."""
        return float(self.losses.nanmean())


class HeadSolution(NamedTuple):
    """The best linear head.

    Attributes:
        weight: ``(C, D)``, float32.
        bias: ``(C,)``, float32; ``None`` without a bias.
        scores: Cross-validation of each penalty, the strongest first.
        chosen: The one whose penalty the head has.
        gradient_norm: Largest component of the gradient of the mean loss with its penalty, computed in float64.
        converged: Whether the solver has converged for the head.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scores: list[PenaltyScore]
    chosen: PenaltyScore
    gradient_norm: float
    converged: bool


def solve_head(
    rows: TrainingRows,
    task: Task,
    classes: int,
    folds: int,
    bias: bool = True,
    one_standard_error: bool = False,
    sample: TrainingRows | None = None,
) -> HeadSolution:
    """Find the best linear head of the training rows.

    Args:
        rows: The training rows.
        task: Gives the loss, which must be convex in the logits.
        classes: Number C of classes.
        folds: Number of cross-validation folds, at least 2.
        bias: Whether the head has a bias.
        one_standard_error: Choose the strongest penalty whose loss is within one standard error of the smallest loss
            (Hastie et al., "The Elements of Statistical Learning", 2009, section 7.10), not that of the smallest loss.
        sample: A sample of the rows that fits in memory, to choose the penalty with; by default all rows.
    """
    compared = rows if sample is None else sample
    coordinates = Coordinates(compared, bias)
    bank = HeadBank(compared, coordinates, torch.arange(folds, device=compared.labels.device), task, classes)
    scores = _path(bank)
    chosen = min(scores, key=lambda score: score.loss)
    if one_standard_error:
        limit = chosen.loss + standard_error(chosen.losses)
        chosen = next(score for score in scores if score.loss <= limit)
    start = chosen.heads.mean(0)
    if sample is not None:
        on_sample = coordinates.head(start)
        coordinates = Coordinates(rows, bias)
        start = coordinates.parameters(*on_sample)
    final = HeadBank(rows, coordinates, torch.tensor([-1], device=rows.labels.device), task, classes)
    solution = final.solve(start[None], chosen.penalty, FINE)
    weight, offset = coordinates.head(solution.parameters[0])
    norm = final.gradient_norm(solution.parameters, chosen.penalty)
    return HeadSolution(weight, offset, scores, chosen, norm, bool(solution.converged.all()))


def standard_error(scores: torch.Tensor) -> float:
    """Standard error of the mean of the folds' scores ``(F,)``."""
    valid = scores[~scores.isnan()]
    return float(valid.std() / math.sqrt(len(valid)))


def _path(bank: HeadBank) -> list[PenaltyScore]:
    """Score the penalties; see :data:`PENALTIES` and :data:`MIN_GAIN`."""
    scores: list[PenaltyScore] = []
    for penalty in PENALTIES:
        start = _extrapolate(scores[-2:]) if scores else bank.zeros()
        scores.append(PenaltyScore.of(bank, start, penalty))
    while len(scores) < MAX_PENALTIES and min(score.loss for score in scores[:-1]) - scores[-1].loss > MIN_GAIN:
        scores.append(PenaltyScore.of(bank, _extrapolate(scores[-2:]), scores[-1].penalty / RATIO))
    while len(scores) < MAX_PENALTIES and min(score.loss for score in scores[1:]) - scores[0].loss > MIN_GAIN:
        scores.insert(0, PenaltyScore.of(bank, scores[0].heads, scores[0].penalty * RATIO))
    return scores


def _extrapolate(scores: list[PenaltyScore]) -> torch.Tensor:
    """Initial heads for the next penalty, on the line through the last two. They save two thirds of the passes."""
    return 2 * scores[-1].heads - scores[0].heads
