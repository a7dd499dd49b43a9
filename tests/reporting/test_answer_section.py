"""The model card reports calibrated answers with intervals, and says what cannot be certified."""

from typing import Any

import numpy as np

from project.evaluation.answers.calibration import Answers
from project.reporting.answer_section import answer_section

REPORT: dict[str, Any] = {
    "calibration": {
        "before": {"nll": [0.5, 0.4, 0.6], "brier": [0.2, 0.1, 0.3], "ece": [0.1, 0.05, 0.15]},
        "after": {"nll": [0.4, 0.3, 0.5], "brier": [0.15, 0.1, 0.2], "ece": [0.02, 0.01, 0.03]},
    },
    "sets": [{"coverage": 0.95, "images": 100, "covered": 96, "size": 1.2}],
    "abstention": [
        {"max_error": 0.01, "share": 0.0, "needed": 230, "images": 100, "answered": 0, "errors": 0},
        {"max_error": 0.02, "share": 0.0, "needed": 90, "images": 100, "answered": 0, "errors": 0},
        {"max_error": 0.05, "share": 0.75, "needed": 45, "images": 100, "answered": 70, "errors": 2},
    ],
    "unknown": [{"rate": 0.05, "images": 100, "alarms": 4}],
}


def answers(report: dict[str, Any], validation: int = 40) -> Answers:
    values, count = np.zeros(100, np.float32), np.zeros(100, np.int32)
    return Answers(2, validation, 1.25, values, values, values > 0, count, values, np.zeros((7, 3), np.int8), report)


def test_all_results_are_in_the_section() -> None:
    text = "\n".join(answer_section(answers(REPORT)))
    assert "Calibrated on 40 validation images and 60 training images, which heads of other" in text
    assert "temperature of 1.250" in text
    assert "| Expected calibration error | 0.100 | 0.050 to 0.150 | 0.020 | 0.010 to 0.030 |" in text
    assert "| 0.95 | 0.960 | 0.902 to 0.984 | 1.20 |" in text
    assert "| 0.01 | none (at least 230 images are needed) | none answered |" in text
    assert "| 0.02 | none (too many errors) | none answered |" in text
    assert "| 0.05 | 0.750 | 2 of 70 |" in text and "with confidence 0.9 " in text
    assert "distance to 7 stored rows" in text and "| 0.05 | 0.040 | 0.016 to 0.098 |" in text


def test_what_was_not_measured_is_left_out() -> None:
    assert answer_section(None) == []
    text = "\n".join(answer_section(answers({**REPORT, "sets": [], "unknown": []}, 100), "they differ"))
    assert "Calibrated on 100 validation images. " in text and "Only validation images are used: they differ." in text
    assert "Prediction sets" not in text and "called unknown" not in text
