"""A task says what a target means, and nothing else does."""

import io
import tokenize
from pathlib import Path

import pytest
import torch

from project.task import Answer, SingleLabel, names_of

PROJECT = Path(__file__).parents[1] / "project"
#: Words that only a task of one label may say; a grid of similarities and a library's own estimator are none.
WORDS = {"softmax", "log_softmax", "argmax", "cross_entropy", "ignore_index", "IGNORED"}


def test_only_the_task_says_softmax_argmax_and_cross_entropy() -> None:
    found = []
    for path in PROJECT.rglob("*.py"):
        if path.name in ("task.py", "label_issues.py"):  # label issues compare neighbours, not answers of the model
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        found += [f"{path.name}:{each.start[0]}: {each.string}" for each in tokens if each.string in WORDS]
    assert not found


def test_answers_labels_and_probabilities_of_one_label() -> None:
    task, logits = SingleLabel(), torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.5, 0.1]], dtype=torch.float16)
    probabilities = task.probabilities(logits)
    assert probabilities.dtype == torch.float32 and torch.allclose(probabilities.sum(1), torch.ones(2))
    answer = task.answer(probabilities)
    assert isinstance(answer, Answer) and answer.label.tolist() == [1, 0], "the first of equal ones"
    assert torch.equal(answer.confidence, probabilities.max(1).values)
    assert names_of(answer, ["ant", "bee", "cat"]) == ["bee", "ant"]
    assert task.labels(torch.tensor([2, 0])).tolist() == [2, 0]
    assert task.labels(torch.tensor([[0.1, 0.7, 0.2]])).tolist() == [1], "of mixed images the largest share"
    assert task.is_among(logits.float(), torch.tensor([2, 2]), 2).tolist() == [True, False]


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_divided_by_its_weight_is_the_mean_cross_entropy(
    weights: torch.Tensor | None, smoothing: float
) -> None:
    logits, targets = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 1])
    summed, weight = SingleLabel().loss(logits, targets, weights, smoothing)
    expected = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits, targets)
    torch.testing.assert_close(summed / weight, expected)
    nothing, none = SingleLabel().loss(logits[:0], targets[:0], weights, smoothing)
    assert float(nothing) == 0 and float(torch.as_tensor(none)) == 0, "a process with padding alone"
