"""What became of an epoch's images, counted: which classes were confused, and what a probability is worth."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from project.data.samplers import IGNORED
from project.runtime.distributed import processes

BINS = 10  # of probability, for people to read
MOST_CLASSES = 100  # for which all confusions are counted: a table of more is mostly zeros


class Each(NamedTuple):
    """What became of each image of an epoch, in this process's order, padding included; on the CPU.

    Attributes:
        confidence: Probability of the predicted class, float32 ``(N,)``.
        predicted: That class, int64 ``(N,)``.
        labels: int64 ``(N,)``; those of padding are :data:`~project.data.samplers.IGNORED`.
    """

    confidence: torch.Tensor
    predicted: torch.Tensor
    labels: torch.Tensor


NOTHING = Each(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))


class Counts:
    """Counts over an epoch, of all processes; adding a batch costs a few microseconds.

    Args:
        classes: Number C of classes.

    Attributes:
        confusion: Of the last epoch that is over: how many images of one class (row) were taken for another (column),
            int64 ``(C, C)``. Of more than 100 classes, ``(C, 2)``: how many of each there are, and how many were right.
        calibration: For each tenth of the probability of the predicted class: images, the sum of their probabilities,
            and how many were right; float64 ``(10, 3)``.
        each: The images of the last epoch that is over, those of this process.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.confusion: torch.Tensor | None = None
        self.calibration: torch.Tensor | None = None
        self.each = NOTHING

    def add(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: probabilities ``(B, C)``, labels int64 ``(B,)``, of which those of padding are ignored."""
        self._parts.append((*probabilities.max(1), labels))

    def take(self, device: torch.device) -> None:
        """End the epoch; all processes do it together."""
        joined = [torch.cat(parts).cpu() for parts in zip(*self._parts, strict=True)]
        self.each = Each(*joined) if joined else NOTHING
        self._parts, count = [], self._classes
        real = self.each.labels != IGNORED
        sure, predicted, labels = (values[real] for values in self.each)
        sure = sure.double().nan_to_num(0.0)  # of a network that has diverged
        right = predicted == labels
        if count <= MOST_CLASSES:
            confusion = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
        else:
            confusion = torch.stack([torch.bincount(each, minlength=count) for each in (labels, labels[right])], 1)
        # To the right of a probability of 1 there is no bin.
        bins = (sure * BINS).long().clamp(max=BINS - 1)
        columns = [torch.bincount(bins, each, BINS) for each in (torch.ones_like(sure), sure, right.double())]
        found = confusion, torch.stack(columns, 1)
        if processes() > 1:
            found = found[0].to(device), found[1].to(device)
            for each in found:
                dist.all_reduce(each)
        self.confusion, self.calibration = found[0].cpu(), found[1].cpu()

    def reset(self) -> None:
        """Forget what was added to an epoch that is not over."""
        self._parts = []
