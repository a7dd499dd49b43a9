"""What a validation has measured, and how a checkpoint holds it."""

from typing import Any

import numpy as np
import pytest
import torch

from project.evaluation.summary import EvaluationSummary

CONFUSION = np.array([[3, 1], [0, 2]], np.int32)
CALIBRATION = np.zeros((10, 3))
SUMMARY = EvaluationSummary(4, {"val/accuracy": 0.75}, 6, CONFUSION, CALIBRATION)


def test_a_checkpoint_holds_it_in_plain_types_and_tensors() -> None:
    state = SUMMARY.state()
    assert list(state) == ["epoch", "metrics", "images", "confusion", "calibration"]
    assert (state["confusion"].dtype, state["calibration"].dtype) == (torch.int32, torch.float64)
    again = EvaluationSummary.from_state(state, 2)
    assert again is not None and (again.epoch, again.metrics, again.images) == (4, {"val/accuracy": 0.75}, 6)
    assert np.array_equal(again.confusion, CONFUSION) and np.array_equal(again.calibration, CALIBRATION)


@pytest.mark.parametrize(
    "changed",
    [
        *({"epoch": None}, {"epoch": "4"}, {"images": 6.0}, {"metrics": [1.0]}, {"metrics": {"val/accuracy": 1}}),
    ],
)
def test_what_is_of_another_form_is_not_taken(changed: dict[str, Any]) -> None:
    assert EvaluationSummary.from_state({**SUMMARY.state(), **changed}, 2) is None
    assert EvaluationSummary.from_state(None, 2) is None


@pytest.mark.parametrize(
    "table",
    [None, torch.zeros(3, 3), -torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16), [[1, 2], [3, 4]]],
)
def test_tables_of_another_form_are_left_out(table: Any) -> None:
    found = EvaluationSummary.from_state({**SUMMARY.state(), "confusion": table}, 2)
    assert found is not None and found.confusion is None and found.calibration is None and found.images == 6


def test_each_class_is_counted_whatever_the_form_of_the_table() -> None:
    matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 5]])
    pairs = np.array([[4, 3], [2, 2], [5, 5]])  # how many there are, and how many were right
    for confusion in (matrix, pairs):
        counted = EvaluationSummary(0, {}, 11, confusion).per_class
        assert counted is not None
        assert [part.tolist() for part in counted] == [[3, 2, 5], [4, 2, 5]]
    assert EvaluationSummary(0).per_class is None
