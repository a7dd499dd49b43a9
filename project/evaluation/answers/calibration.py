"""Answers: the calibration of a classifier, as its checkpoint keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from project.errors import ConfigError, damaged_checkpoint
from project.evaluation.answers.abstention import Abstention, certify
from project.evaluation.answers.held_out import Calibration
from project.evaluation.answers.measurement import COVERAGES, FALSE_ALARMS, MAX_ERRORS, REPORT, measure
from project.evaluation.answers.policy import AnswerPolicy
from project.evaluation.answers.prediction_sets import images_needed as images_for_sets
from project.evaluation.answers.prediction_sets import set_threshold
from project.evaluation.answers.temperature import FOLDS, fit_temperature
from project.evaluation.answers.unknown_images import distance_thresholds
from project.evaluation.answers.unknown_images import images_needed as images_for_alarms

#: Entry of a checkpoint.
KEY = "answers"
#: With fewer calibration images, nothing is calibrated.
MIN_IMAGES = 2 * FOLDS
#: Smallest distance of a limit from 0 and 1. Closer ones need far more images than a checkpoint keeps.
MARGIN = 1e-6
#: Tensors of the state, each with its type.
TENSORS = {
    "true_scores": torch.float32,
    "confidence": torch.float32,
    "correct": torch.bool,
    "predicted": torch.int32,
    "distances": torch.float32,
    "rows": torch.int8,
}


class Limits(NamedTuple):
    """Limits that can be asked of answers; see :meth:`Answers.policy`.

    Attributes:
        coverages: Of prediction sets.
        max_errors: Of abstention.
        false_alarms: Of the detection of unknown images.
    """

    coverages: list[float]
    max_errors: list[float]
    false_alarms: list[float]


@dataclass(frozen=True)
class Answers:
    """Calibration of a classifier on N held-out images.

    Any coverage, error and rate of false alarms can be chosen later: the values of each image are kept, not thresholds.
    They are those of the probabilities without temperature, which are exchangeable with those of new images.

    Attributes:
        classes: Number C of classes.
        validation: Number of validation images among the N images; the others are training images with out-of-fold
            predictions.
        temperature: Of the calibrated probabilities.
        true_scores: Conformal score of each image's true class, float32 ``(N,)``.
        confidence: Probability of its predicted class, float32 ``(N,)``.
        correct: Whether the prediction is right, bool ``(N,)``.
        predicted: Predicted class, int32 ``(N,)``.
        distances: Distance to the nearest stored rows, float32 ``(N,)``.
        rows: Features of training images, int8 ``(M, D)``.
        report: Cross-fitted results in plain types, see :func:`~project.evaluation.answers.measurement.measure`.
    """

    classes: int
    validation: int
    temperature: float
    true_scores: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray
    distances: np.ndarray
    rows: np.ndarray
    report: Mapping[str, Any]

    @classmethod
    def fit(cls, calibration: Calibration, rows: np.ndarray) -> Answers:
        """Calibrate the answers of a classifier.

        Args:
            calibration: At least :data:`MIN_IMAGES` images.
            rows: Features of training images, int8 ``(M, D)``.
        """
        images = calibration.images
        return cls(
            classes=images.probabilities.shape[1],
            validation=calibration.validation,
            temperature=fit_temperature(images.probabilities, images.labels),
            true_scores=_rounded_up(images.true_scores),
            confidence=images.confidence.astype(np.float32),
            correct=images.correct,
            predicted=images.predicted.astype(np.int32),
            distances=images.distances.astype(np.float32),
            rows=rows,
            report=measure(images),
        )

    def __len__(self) -> int:
        """Number N of calibration images."""
        return len(self.confidence)

    def policy(
        self, coverage: float | None = None, max_error: float | None = None, false_alarms: float | None = None
    ) -> AnswerPolicy:
        """How to answer new images.

        Args:
            coverage: Probability that the set of an image contains its class; ``None`` for no sets.
            max_error: Share of the answered images that is misclassified at most; ``None`` to answer all.
            false_alarms: Share of the images of known classes that is called unknown at most; ``None`` for none.

        Raises:
            ConfigError: A value is not between :data:`MARGIN` and 1 - :data:`MARGIN`, or needs more calibration images.
        """
        require_fractions(coverage=coverage, max_error=max_error, false_alarms=false_alarms)
        confidence = None if max_error is None else self._require_certified(max_error).threshold
        score = distances = None
        if coverage is not None:
            self._require(images_for_sets(coverage), f"coverage {coverage:g}", "a smaller coverage")
            score = set_threshold(self.true_scores, coverage)
        if false_alarms is not None:
            self._require(images_for_alarms(false_alarms), f"false_alarms {false_alarms:g}", "a larger rate")
            distances = distance_thresholds(self.distances, self.predicted, self.classes, false_alarms)
        return AnswerPolicy(self.temperature, score, confidence, distances, self.rows)

    def reported_limits(self) -> Limits:
        """The limits of the model card that the calibration images are enough for."""
        return Limits(
            [coverage for coverage in COVERAGES if len(self) >= images_for_sets(coverage)],
            [error for error in MAX_ERRORS if self.abstention(error).threshold is not None],
            [rate for rate in FALSE_ALARMS if len(self) >= images_for_alarms(rate)],
        )

    def abstention(self, max_error: float) -> Abstention:
        """The threshold for an error rate, and the share of the images that it answers."""
        return certify(self.confidence, self.correct, max_error)

    def _require(self, needed: int, setting: str, remedy: str) -> None:
        if len(self) < needed:
            raise ConfigError(
                f"{setting} needs {needed:,} calibration images, but the checkpoint has {len(self):,}.\n"
                f"Use {remedy}, or fit again with more validation images (--data.val_fraction)."
            )

    def _require_certified(self, max_error: float) -> Abstention:
        abstention = self.abstention(max_error)
        if abstention.threshold is not None:
            return abstention
        problem = f"max_error {max_error:g} cannot be certified: "
        if len(self) < abstention.needed:
            problem += f"it needs at least {abstention.needed:,} images that are answered without an error, but the "
            problem += f"checkpoint has {len(self):,} calibration images."
        else:
            problem += f"the most confident of the {len(self):,} calibration images contain too many errors."
        remedy = "Use a larger max_error, or fit again with more validation images (--data.val_fraction)."
        raise ConfigError(f"{problem}\n{remedy}")

    def state(self) -> dict[str, Any]:
        """State for a checkpoint: plain types and tensors."""
        return {
            "classes": self.classes,
            "validation": self.validation,
            "temperature": self.temperature,
            "report": dict(self.report),
            **{name: torch.from_numpy(getattr(self, name)) for name in TENSORS},
        }

    @classmethod
    def from_state(cls, state: Any, classes: int, width: int) -> Answers | None:
        """Restore the answers from a checkpoint.

        Args:
            state: Entry :data:`KEY` of the checkpoint; ``None`` if it has none.
            classes: Number C of classes of the model.
            width: Number D of its features.

        Raises:
            CheckpointError: The entry is damaged.
        """
        if state is None:
            return None
        if not isinstance(state, dict) or not _is_valid(state, classes, width):
            raise damaged_checkpoint("The checkpoint is damaged: its calibrated answers are invalid.")
        arrays = {name: state[name].numpy() for name in TENSORS}
        return cls(classes, state["validation"], state["temperature"], report=state["report"], **arrays)


def require_fractions(**limits: float | None) -> None:
    """Check the range of limits; ``None`` is no limit.

    Raises:
        ConfigError: A value is not between :data:`MARGIN` and 1 - :data:`MARGIN`.
    """
    for name, value in limits.items():
        if value is not None and not MARGIN <= value <= 1 - MARGIN:
            percent = f" For {value:g} %, use {value / 100:g}." if 1 < value < 100 else ""
            raise ConfigError(f"{name} must be between {MARGIN} and {1 - MARGIN}, not {value}.{percent}")


def _rounded_up(values: np.ndarray) -> np.ndarray:
    """The smallest float32 values that are not below float64 values: a threshold that is rounded down covers less."""
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)


def _is_valid(state: Mapping[Any, Any], classes: int, width: int) -> bool:
    tensors = [state.get(name) for name in TENSORS]
    if not all(
        isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.layout == torch.strided
        for tensor, dtype in zip(tensors, TENSORS.values(), strict=True)
    ):
        return False
    *values, rows = (tuple(state[name].shape) for name in TENSORS)
    temperature, validation = state.get("temperature"), state.get("validation")
    return (
        state.get("classes") == classes
        and set(values) == {(len(state["confidence"]),)}
        and len(state["confidence"]) > 0
        and bool(((state["predicted"] >= 0) & (state["predicted"] < classes)).all())
        and len(rows) == 2
        and rows[0] > 0
        and rows[1] == width
        and type(temperature) is float
        and 0 < temperature < math.inf
        and type(validation) is int
        and 0 <= validation <= len(state["confidence"])
        and isinstance(state.get("report"), dict)
        and state["report"].keys() == set(REPORT)
    )
