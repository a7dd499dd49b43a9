"""Section of the model card about calibrated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from project.evaluation.answers.abstention import DELTA
from project.evaluation.answers.calibration import Answers
from project.evaluation.confidence_intervals import wilson
from project.reporting.limitations import pluralize
from project.reporting.markdown import format_interval, table

#: Display name of each score of calibration, in the order of the table.
SCORES = {"nll": "Negative log-likelihood", "brier": "Brier score", "ece": "Expected calibration error"}


def answer_section(answers: Answers | None, note: str = "") -> list[str]:
    """How far to rely on single predictions, as Markdown; empty if nothing was calibrated.

    Args:
        answers: Calibration of the checkpoint.
        note: Why out-of-fold predictions are not used, a clause; empty if they are, or are not needed.
    """
    if answers is None:
        return []
    images, added = pluralize(answers.validation, "validation image"), len(answers) - answers.validation
    if added:
        images += f" and {pluralize(added, 'training image')}, which heads of other cross-validation folds predict"
    report = answers.report
    return [
        "### Single predictions\n",
        f"Calibrated on {images}. Each image is measured with settings that the other images chose (5 folds)."
        f"{f' Only validation images are used: {note}.' if note else ''}\n",
        *_scores(report["calibration"], answers.temperature),
        *_sets(report["sets"]),
        *_abstention(report["abstention"]),
        *_unknown(report["unknown"], len(answers.rows)),
    ]


def _scores(calibration: Mapping[str, Mapping[str, Sequence[float]]], temperature: float) -> list[str]:
    rows = []
    for key, name in SCORES.items():
        cells = [name]
        for when in ("before", "after"):
            value, low, high = calibration[when][key]
            cells += [f"{value:.3f}", format_interval((low, high))]
        rows.append(cells)
    return [
        f"Probabilities with a temperature of {temperature:.3f} (Guo et al. 2017); basic bootstrap intervals:\n",
        table(("Score", "Before", "95 % interval", "With temperature", "95 % interval"), rows),
    ]


def _sets(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            f"{entry['coverage']:g}",
            f"{entry['covered'] / entry['images']:.3f}",
            format_interval(wilson(entry["covered"], entry["images"])),
            f"{entry['size']:.2f}",
        )
        for entry in sets
    ]
    if not rows:
        return []
    return [
        "Prediction sets, `--coverage` (split conformal prediction; Romano et al. 2020). A set always contains the "
        "predicted class, so it covers more than stated if the accuracy is higher:\n",
        table(("Stated coverage", "Covered", "95 % interval", "Classes per set"), rows),
    ]


def _abstention(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in entries:
        measured = f"{entry['errors']} of {entry['answered']}" if entry["answered"] else "none answered"
        is_enough = entry["images"] >= entry["needed"]
        reason = "too many errors" if is_enough else f"at least {entry['needed']:,} images are needed"
        share = f"{entry['share']:.3f}" if entry["share"] else f"none ({reason})"
        rows.append((f"{entry['max_error']:g}", share, measured))
    return [
        f"Answers whose error is certified, `--max_error`, with confidence {1 - DELTA:g} (learn then test; "
        "Angelopoulos et al. 2021):\n",
        table(("Stated error", "Share that is answered", "Wrong, with thresholds of the other images"), rows),
    ]


def _unknown(entries: Sequence[Mapping[str, Any]], stored: int) -> list[str]:
    rows = [
        (
            f"{entry['rate']:g}",
            f"{entry['alarms'] / entry['images']:.3f}",
            format_interval(wilson(entry["alarms"], entry["images"])),
        )
        for entry in entries
    ]
    if not rows:
        return []
    return [
        f"Images of known classes that are called unknown, `--false_alarms` (distance to {stored:,} stored rows; "
        "Sun et al. 2022). How many unknown images are found depends on these images, and is not measured:\n",
        table(("Stated rate", "False alarms", "95 % interval"), rows),
    ]
