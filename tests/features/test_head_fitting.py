"""Heads are fitted to the features of training images: the parameters are those of the solver."""

import pytest
import torch
from torch import nn

from project.features import head_fitting
from project.features.computed_features import ComputedFeatures
from project.features.feature_reader import FeatureReader
from project.features.head_fitting import PenaltyChoice, call_fit, solve_linear_head
from project.models.head_bank import TrainingRows
from project.models.head_solver import FIXED_PENALTY, solve_head
from project.models.heads import PrototypeHead
from project.task import SingleLabel

TASK = SingleLabel()
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(60) % 3
FEATURES = torch.randn(60, 8, generator=GENERATOR) + nn.functional.one_hot(LABELS, 8)
FOLDS = torch.arange(60) // 3 % 5
CPU = torch.device("cpu")
READER = FeatureReader(ComputedFeatures(FEATURES, LABELS), lambda rows: rows, CPU, torch.float32)


def targets(labels: torch.Tensor) -> torch.Tensor:
    return TASK.target_weights(labels, 3, None, 0.0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_parameters_are_those_of_the_solver(bias: bool) -> None:
    head = nn.Linear(8, 3, bias)
    _, choice = solve_linear_head(head, READER, FOLDS, TASK, targets, 10**6)
    expected = solve_head(TrainingRows(FEATURES.__getitem__, LABELS, FOLDS, targets), TASK, 3, 5, bias)
    assert torch.equal(head.weight, expected.weight)
    assert expected.bias is None if not bias else torch.equal(head.bias, expected.bias)
    assert choice == PenaltyChoice(expected.penalty, 5, 0)


@pytest.mark.parametrize(("values", "work"), [(30 * 8, 10**9), (10**6, 30 * 8 * 3)], ids=["memory", "time"])
def test_the_penalty_is_chosen_on_a_sample(values: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_fitting, "MIN_SAMPLE", 1)
    monkeypatch.setattr(head_fitting, "MAX_WORK", {"cpu": work})
    _, choice = solve_linear_head(nn.Linear(8, 3), READER, FOLDS, TASK, targets, values)
    assert (choice.folds, choice.sample) == (5, 30)
    assert str(choice).endswith("chosen by 5-fold cross-validation on a sample of 30 images")


def test_the_penalty_is_fixed_if_nothing_can_be_held_out() -> None:
    solution, choice = solve_linear_head(nn.Linear(8, 3), READER, torch.full((60,), -1), TASK, targets, 10**6)
    assert choice == PenaltyChoice(FIXED_PENALTY, 0, 0) and not solution.scores


def test_a_head_with_a_method_fit_reads_all_rows() -> None:
    head, means = PrototypeHead(8, 3), torch.stack([FEATURES[label == LABELS].mean(0) for label in range(3)])
    call_fit(head, READER)
    assert head(means).argmax(1).tolist() == [0, 1, 2]


def test_out_of_fold_logits_are_those_of_the_first_view() -> None:
    class TwoViews(ComputedFeatures):
        view_count = 2

        def read(self, indices: torch.Tensor) -> torch.Tensor:
            return super().read(indices % 60) + (indices >= 60)[:, None]

    reader = FeatureReader(TwoViews(FEATURES, LABELS), lambda rows: rows, CPU, torch.float32)
    solution, _ = solve_linear_head(nn.Linear(8, 3), reader, FOLDS, TASK, targets, 10**6, out_of_fold=True)
    assert solution.out_of_fold is not None and solution.out_of_fold.shape == (60, 3)
    assert (solution.out_of_fold.argmax(1) == LABELS).float().mean() > 0.5
    assert solve_linear_head(nn.Linear(8, 3), reader, FOLDS, TASK, targets, 10**6)[0].out_of_fold is None
