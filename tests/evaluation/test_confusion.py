"""Confusion matrix and calibration bins of an epoch."""

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from project.evaluation.confusion import ConfusionCounts, ImagePredictions
from project.evaluation.epoch_metrics import NO_PREDICTIONS
from project.evaluation.metrics import BINS

CPU = torch.device("cpu")


def _predictions(classes: int) -> tuple[torch.Tensor, torch.Tensor, ImagePredictions]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(40, classes, generator=generator).mul(3).softmax(1)
    labels = torch.randint(0, classes, (40,), generator=generator)
    return probabilities, labels, ImagePredictions(*probabilities.max(1), labels, labels >= 0)


def test_confusion_and_calibration_count_all_images() -> None:
    probabilities, labels, predictions = _predictions(5)
    counts = ConfusionCounts.of(predictions, 5, CPU)
    expected = multiclass_confusion_matrix(probabilities, labels, 5)
    assert torch.equal(counts.confusion, expected)
    images, confidence, correct = counts.calibration.sum(0).tolist()
    assert images == counts.images == 40 and correct == float(expected.diagonal().sum())
    assert abs(confidence - float(probabilities.max(1).values.sum())) < 1e-4
    assert torch.equal(counts.hits, expected.diagonal())
    assert torch.equal(counts.support, expected.sum(1)) and torch.equal(counts.predicted, expected.sum(0))


def test_many_classes_count_only_support_and_true_positives() -> None:
    probabilities, labels, predictions = _predictions(200)
    counts = ConfusionCounts.of(predictions, 200, CPU)
    assert counts.confusion.shape == (200, 2)
    assert torch.equal(counts.confusion[:, 0], labels.bincount(minlength=200))
    assert int(counts.confusion[:, 1].sum()) == int((probabilities.argmax(1) == labels).sum())


def test_confidence_of_one_is_in_the_last_bin_and_an_empty_epoch_is_counted() -> None:
    one = ImagePredictions(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([0]), torch.tensor([True]))
    assert ConfusionCounts.of(one, 2, CPU).calibration[BINS - 1].tolist() == [1, 1, 1]
    assert ConfusionCounts.of(NO_PREDICTIONS, 2, CPU).calibration.sum() == 0
