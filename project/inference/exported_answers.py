"""Calibrated answers in an exported file: what its outputs are compared with, as plain values."""

from __future__ import annotations

from typing import Any

from project.evaluation.answers.calibration import Answers

#: How to compute the answers for one image from its ``probabilities`` p, and from its distance.
FORMULAS = {
    "set": "the classes, in descending order of p, of which the more probable ones sum up to sets[COVERAGE] at most",
    "answered": "max(p) >= answered[MAX_ERROR]",
    "known": "distance <= known[FALSE_ALARMS][argmax(p)]",
}


def answer_metadata(answers: Answers) -> dict[str, Any]:
    """Temperature and thresholds in plain types, for the limits that the model card reports.

    Args:
        answers: Of the checkpoint.

    Returns:
        ``temperature``; ``sets``, ``answered`` and ``known``: thresholds by coverage, error and rate of false alarms,
        those of ``known`` one for each class; ``images``: number of calibration images; ``formulas``.
    """
    limits = answers.reported_limits()
    known = {f"{rate:g}": answers.policy(false_alarms=rate).distance_thresholds for rate in limits.false_alarms}
    # A set contains the most probable class, whose sum is 0.
    sets = {f"{coverage:g}": answers.policy(coverage=coverage).set_threshold or 0.0 for coverage in limits.coverages}
    return {
        "temperature": answers.temperature,
        "sets": {name: max(threshold, 0.0) for name, threshold in sets.items()},
        "answered": {f"{error:g}": answers.policy(max_error=error).confidence_threshold for error in limits.max_errors},
        "known": {name: thresholds.tolist() for name, thresholds in known.items() if thresholds is not None},
        "images": len(answers),
        "formulas": FORMULAS,
    }
