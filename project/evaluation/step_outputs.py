"""Outputs of the steps of a classifier, for metrics, callbacks and predictions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from project.evaluation.answers.policy import Answered
from project.task import Weight


class StepOutput(NamedTuple):
    """Outputs of a step, without padding.

    Attributes:
        loss: Summed loss of the batch, and the divisor for the mean.
        probabilities: ``(B, C)``, float32, detached.
        labels: int64 ``(B,)``.
        features: Inputs of the head ``(B, D)``, detached.
        averaged: The same of the averaged weights; ``None`` if they are not validated.
    """

    loss: tuple[torch.Tensor, Weight]
    probabilities: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    averaged: StepOutput | None = None


class Outputs(NamedTuple):
    """Predictions of a batch.

    Attributes:
        probabilities: ``(B, C)``, float32.
        answers: Of the answer policy; ``None`` without one.
        features: Inputs of the head ``(B, D)``, if the classifier outputs them.
    """

    probabilities: torch.Tensor
    answers: Answered | None = None
    features: torch.Tensor | None = None
