"""State of an evaluation summary in a checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

from project.evaluation.summary import EvaluationSummary

CONFUSION = np.array([[3, 1], [0, 2]], np.int32)
CALIBRATION = np.zeros((10, 3))
SUMMARY = EvaluationSummary(4, {"val/accuracy": 0.75}, 6, CONFUSION, CALIBRATION, "ema")


def test_state_has_plain_types_and_tensors_and_can_be_restored() -> None:
    state = SUMMARY.state()
    assert list(state) == ["epoch", "metrics", "images", "confusion", "calibration", "weights", "correct"]
    assert (state["confusion"].dtype, state["calibration"].dtype) == (torch.int32, torch.float64)
    restored = EvaluationSummary.from_state(state, 2)
    assert restored is not None
    assert (restored.epoch, restored.metrics, restored.images) == (4, {"val/accuracy": 0.75}, 6)
    assert restored.weights == "ema"
    assert np.array_equal(restored.confusion, CONFUSION) and np.array_equal(restored.calibration, CALIBRATION)


@pytest.mark.parametrize(
    "changed",
    [{"epoch": None}, {"epoch": "4"}, {"images": 6.0}, {"metrics": [1.0]}, {"metrics": {"val/accuracy": 1}}],
)
def test_malformed_state_is_ignored(changed: dict[str, Any]) -> None:
    assert EvaluationSummary.from_state({**SUMMARY.state(), **changed}, 2) is None
    assert EvaluationSummary.from_state(None, 2) is None


@pytest.mark.parametrize(
    "table",
    [None, torch.zeros(3, 3), -torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16), [[1, 2], [3, 4]]],
)
def test_malformed_tables_are_ignored(table: Any) -> None:
    summary = EvaluationSummary.from_state({**SUMMARY.state(), "confusion": table}, 2)
    assert summary is not None and summary.confusion is None and summary.calibration is None and summary.images == 6


def test_per_class_counts_are_equal_for_both_table_formats() -> None:
    matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 5]])
    pairs = np.array([[4, 3], [2, 2], [5, 5]])  # support, true positives
    for confusion in (matrix, pairs):
        per_class = EvaluationSummary(0, {}, 11, confusion).per_class
        assert per_class is not None
        assert [counts.tolist() for counts in per_class] == [[3, 2, 5], [4, 2, 5]]
    assert EvaluationSummary(0).per_class is None
