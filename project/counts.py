"""What became of an epoch's images, counted: which classes were confused, and what a probability is worth."""

from __future__ import annotations

import torch
import torch.distributed as dist

from project.loss import processes
from project.padding import IGNORED

BINS = 10  # of probability, for people to read
MOST_CLASSES = 100  # for which all confusions are counted: a table of more is mostly zeros


class Counts:
    """Counts over an epoch, of all processes; adding a batch costs a few microseconds.

    Args:
        classes: Number C of classes.

    Attributes:
        confusion: Of the last epoch that is over: how many images of one class (row) were taken for another (column),
            int64 ``(C, C)``. Of more than 100 classes, ``(C, 2)``: how many of each there are, and how many were right.
        calibration: For each tenth of the probability of the predicted class: images, the sum of their probabilities,
            and how many were right; float64 ``(10, 3)``.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.confusion: torch.Tensor | None = None
        self.calibration: torch.Tensor | None = None

    def add(self, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: probabilities ``(B, C)``, labels int64 ``(B,)``, of which those of padding are ignored."""
        self._parts.append((*probabilities.max(1), labels))

    def take(self, device: torch.device) -> None:
        """End the epoch; all processes do it together."""
        sure, predicted, labels, count = torch.zeros(0), *(torch.zeros(0, dtype=torch.long),) * 2, self._classes
        if self._parts:
            sure, predicted, labels = (torch.cat(each).cpu() for each in zip(*self._parts, strict=True))
        self._parts = []
        real = labels != IGNORED
        sure, predicted, labels = sure[real].double(), predicted[real], labels[real]
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
