"""Limitations of a model, derived from its evaluation and its class counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from project.errors import join_names
from project.evaluation.confidence_intervals import wilson
from project.evaluation.summary import EvaluationSummary

MIN_IMAGES = 10  # per class in validation; with fewer, its metrics are unreliable
IMBALANCE_RATIO = 3.0  # largest over smallest class
MAX_NAMES = 3
MIN_CALIBRATION_GAP = 0.02


def limitations(
    evaluation: EvaluationSummary | None, classes: Sequence[str], counts: Mapping[str, Sequence[int]], validations: int
) -> list[str]:
    """One sentence or two per limitation, the most important first.

    Args:
        evaluation: Validation results of the best epoch, if any.
        classes: Class names.
        counts: Images per class, by split.
        validations: Number of validations that the best one was selected from.
    """
    sentences: list[str] = []
    if evaluation is not None:
        if validations > 1:
            sentences.append(
                f"The best of {validations} validations was selected by its accuracy, so the validation metrics are "
                "optimistic. For an unbiased estimate, run python -m project test on a held-out test split."
            )
        sentences += _uncertainty(evaluation) + _weak_classes(evaluation, classes)
        sentences += _confusions(evaluation, classes) + _miscalibration(evaluation)
    return sentences + _class_imbalance(classes, counts["train"])


def _uncertainty(evaluation: EvaluationSummary) -> list[str]:
    if not evaluation.images or "val/accuracy" not in evaluation.metrics:
        return []
    low, high = wilson(evaluation.metrics["val/accuracy"] * evaluation.images, evaluation.images)
    images = pluralize(evaluation.images, "validation image")
    return [f"With {images}, the 95 % interval of the accuracy is {100 * low:.1f} % to {100 * high:.1f} %."]


def _weak_classes(evaluation: EvaluationSummary, classes: Sequence[str]) -> list[str]:
    if evaluation.per_class is None:
        return []
    correct, support = evaluation.per_class
    present = [label for label in range(len(support)) if support[label]]
    recall, accuracy = correct / np.maximum(support, 1), correct.sum() / max(support.sum(), 1)
    weak = [label for label in present if recall[label] < accuracy]
    worst = sorted(weak, key=lambda label: (recall[label], -support[label]))
    sentences = []
    if worst:
        shown = [f"{classes[label]} ({correct[label]:.0f} of {support[label]:.0f})" for label in worst[:MAX_NAMES]]
        names = ", ".join(shown)
        ties = sum(recall[label] == recall[worst[MAX_NAMES - 1]] for label in worst[MAX_NAMES:])
        sentences.append(f"Lowest recall: {names}{f', and {ties} more with the same recall' if ties else ''}.")
    few = [classes[label] for label in present if support[label] < MIN_IMAGES]
    if few:
        sentences.append(
            f"Fewer than {MIN_IMAGES} validation images for {join_names(few, MAX_NAMES)}: the metrics are unreliable."
        )
    absent = [name for name, count in zip(classes, support, strict=True) if not count]
    if absent:
        sentences.append(f"No validation images for {join_names(absent, MAX_NAMES)}: the performance is unknown.")
    return sentences


def _confusions(evaluation: EvaluationSummary, classes: Sequence[str]) -> list[str]:
    confusion = evaluation.confusion
    if confusion is None or confusion.shape[0] != confusion.shape[1]:
        return []
    errors = confusion - np.diag(np.diagonal(confusion))
    order = [int(cell) for cell in np.argsort(-errors, axis=None, kind="stable") if errors.flat[cell]]
    if not order:
        return []
    pairs = [(*divmod(cell, len(classes)), int(errors.flat[cell])) for cell in order[:MAX_NAMES]]
    names = ", ".join(
        f"{classes[true]} predicted as {classes[predicted]} ({pluralize(count, 'image')})"
        for true, predicted, count in pairs
    )
    ties = sum(errors.flat[cell] == pairs[-1][2] for cell in order[MAX_NAMES:])
    return [f"Most frequent errors: {names}{f', and {ties} other pairs with the same count' if ties else ''}."]


def _miscalibration(evaluation: EvaluationSummary) -> list[str]:
    if evaluation.calibration is None or not evaluation.calibration[:, 0].sum():
        return []
    images, confidence, correct = evaluation.calibration.sum(0)
    gap = (confidence - correct) / images
    if abs(gap) < MIN_CALIBRATION_GAP:
        return []
    return [
        f"The model is {'over' if gap > 0 else 'under'}confident: its mean confidence is "
        f"{100 * confidence / images:.1f} %, its accuracy {100 * correct / images:.1f} %."
    ]


def _class_imbalance(classes: Sequence[str], counts: Sequence[int]) -> list[str]:
    largest, smallest = max(range(len(counts)), key=counts.__getitem__), min(range(len(counts)), key=counts.__getitem__)
    if not counts[smallest] or counts[largest] / counts[smallest] < IMBALANCE_RATIO:
        return []
    return [
        f"The classes are imbalanced: {pluralize(counts[largest], 'training image')} of {classes[largest]}, "
        f"{counts[smallest]:,} of {classes[smallest]}. Large classes dominate the accuracy; macro F1 weights all "
        "classes equally."
    ]


def pluralize(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, such as "1 image" or "2 images"; ``plural`` is for irregular nouns."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
