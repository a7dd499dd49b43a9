"""Counts of an epoch are those of its images."""

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from project.evaluation.confusion import ConfusionCounts, ImagePredictions
from project.evaluation.epoch_metrics import NOTHING
from project.evaluation.metrics import BINS

CPU = torch.device("cpu")


def _answers(classes: int) -> tuple[torch.Tensor, torch.Tensor, ImagePredictions]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(40, classes, generator=generator).mul(3).softmax(1)
    labels = torch.randint(0, classes, (40,), generator=generator)
    return probabilities, labels, ImagePredictions(*probabilities.max(1), labels, labels >= 0)


def test_confusion_and_calibration_are_those_of_all_images() -> None:
    probabilities, labels, answers = _answers(5)
    counts = ConfusionCounts.of(answers, 5, CPU)
    expected = multiclass_confusion_matrix(probabilities, labels, 5)
    assert torch.equal(counts.confusion, expected)
    images, sure, right = counts.calibration.sum(0).tolist()
    assert images == counts.images == 40 and right == float(expected.diagonal().sum())
    assert abs(sure - float(probabilities.max(1).values.sum())) < 1e-4
    assert torch.equal(counts.hits, expected.diagonal())
    assert torch.equal(counts.support, expected.sum(1)) and torch.equal(counts.predicted, expected.sum(0))


def test_of_many_classes_only_the_right_ones_are_counted() -> None:
    probabilities, labels, answers = _answers(200)
    counts = ConfusionCounts.of(answers, 200, CPU)
    assert counts.confusion.shape == (200, 2)
    assert torch.equal(counts.confusion[:, 0], labels.bincount(minlength=200))
    assert int(counts.confusion[:, 1].sum()) == int((probabilities.argmax(1) == labels).sum())


def test_a_confidence_of_one_is_in_the_last_bin_and_an_epoch_of_nothing_is_counted() -> None:
    one = ImagePredictions(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([True]))
    assert ConfusionCounts.of(one, 2, CPU).calibration[BINS - 1].tolist() == [1, 1, 1]
    assert ConfusionCounts.of(NOTHING, 2, CPU).calibration.sum() == 0
