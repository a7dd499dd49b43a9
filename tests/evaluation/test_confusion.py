"""Counts of an epoch are those of its images, padding left out."""

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from project.data.samplers import IGNORED
from project.evaluation.confusion import Counts

CPU = torch.device("cpu")


def _batches(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(40, classes, generator=generator).mul(3).softmax(1)
    return probabilities, torch.randint(0, classes, (40,), generator=generator)


def test_confusion_and_calibration_are_those_of_all_batches() -> None:
    probabilities, labels = _batches(5)
    counts = Counts(5)
    for at in range(0, 40, 16):
        counts.add(probabilities[at : at + 16], labels[at : at + 16])
    counts.add(probabilities[:3], torch.full((3,), IGNORED))
    counts.take(CPU)
    expected = multiclass_confusion_matrix(probabilities, labels, 5)
    assert counts.confusion is not None and torch.equal(counts.confusion, expected)
    assert counts.calibration is not None
    images, sure, right = counts.calibration.sum(0).tolist()
    assert images == 40 and right == float(expected.diagonal().sum())
    assert abs(sure - float(probabilities.max(1).values.sum())) < 1e-4


def test_of_many_classes_only_the_right_ones_are_counted() -> None:
    probabilities, labels = _batches(200)
    counts = Counts(200)
    counts.add(probabilities, labels)
    counts.take(CPU)
    assert counts.confusion is not None and counts.confusion.shape == (200, 2)
    assert torch.equal(counts.confusion[:, 0], labels.bincount(minlength=200))
    assert int(counts.confusion[:, 1].sum()) == int((probabilities.argmax(1) == labels).sum())


def test_certainty_of_one_and_an_epoch_of_nothing_are_counted() -> None:
    counts = Counts(2)
    counts.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    counts.take(CPU)
    assert counts.calibration is not None and counts.calibration[9].tolist() == [1, 1, 1]
    counts.take(CPU)
    assert counts.calibration.sum() == 0
