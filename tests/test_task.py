"""Tasks, and that no other module depends on the kind of task."""

import io
import tokenize
from pathlib import Path

import pytest
import torch

from project.task import Prediction, SingleLabel

PROJECT = Path(__file__).parents[1] / "project"
#: Names that only a single-label task may use.
SINGLE_LABEL_NAMES = {"softmax", "log_softmax", "argmax", "cross_entropy", "ignore_index", "IGNORED"}


def test_only_the_task_uses_softmax_argmax_and_cross_entropy() -> None:
    uses = []
    for path in PROJECT.rglob("*.py"):
        # Label issues compare neighbours, and the statistics of answers are those of one class per image.
        if path.name in ("task.py", "label_issues.py") or path.parent.name == "answers":
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        uses += [
            f"{path.name}:{token.start[0]}: {token.string}" for token in tokens if token.string in SINGLE_LABEL_NAMES
        ]
    assert not uses


def test_predictions_labels_and_probabilities_of_a_single_label_task() -> None:
    task, logits = SingleLabel(), torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.5, 0.1]], dtype=torch.float16)
    probabilities = task.probabilities(logits)
    assert probabilities.dtype == torch.float32 and torch.allclose(probabilities.sum(1), torch.ones(2))
    prediction = task.predict(probabilities)
    assert isinstance(prediction, Prediction) and prediction.label.tolist() == [1, 0], "the first class of a tie"
    assert torch.equal(prediction.confidence, probabilities.max(1).values)
    assert task.labels(torch.tensor([2, 0])).tolist() == [2, 0]
    assert task.labels(torch.tensor([[0.1, 0.7, 0.2]])).tolist() == [1], (
        "the class with the highest probability of a mixed target"
    )
    assert task.in_top_k(logits.float(), torch.tensor([2, 2]), 2).tolist() == [True, False]


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_summed_loss_divided_by_its_weight_is_the_mean_cross_entropy(
    weights: torch.Tensor | None, smoothing: float
) -> None:
    logits, targets = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 1])
    summed, weight = SingleLabel().loss(logits, targets, weights, smoothing)
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits, targets)
    torch.testing.assert_close(summed / weight, expected)
    summed, weight = SingleLabel().loss(logits[:0], targets[:0], weights, smoothing)
    assert float(summed) == 0 and float(torch.as_tensor(weight)) == 0, "an empty batch"
