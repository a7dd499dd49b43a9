"""Epoch metrics, compared with torchmetrics."""

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_recall,
)

from project.evaluation.epoch_metrics import EpochMetrics
from project.task import SingleLabel

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [2, 4, 7, 150])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_metrics_equal_torchmetrics(classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    probabilities = torch.randn(120, classes, generator=generator).mul(sharpness).softmax(1)
    labels = torch.randint(
        0, max(classes - 1, 2), (120,), generator=generator
    )  # the last of four or more classes has no image
    names = [f"c{number}" for number in range(classes)]
    metrics = EpochMetrics("val", SingleLabel(), names)
    for batch, targets in zip(probabilities.split(50), labels.split(50), strict=True):
        loss = SingleLabel().loss(batch.log(), targets, None, 0.0)
        metrics.update(loss, batch, targets)
    values = metrics.compute(CPU)
    has_images = torch.bincount(labels, minlength=classes) > 0  # other classes have no recall and no F1
    expected = {
        "val/loss": torch.nn.functional.nll_loss(probabilities.log(), labels),
        "val/accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro"),
        "val/f1": multiclass_f1_score(probabilities, labels, classes, average="none")[has_images].mean(),
        "val/ece": multiclass_calibration_error(probabilities, labels, classes, n_bins=15),
    }
    if classes > 5:
        expected["val/top5"] = multiclass_accuracy(probabilities, labels, classes, average="micro", top_k=5)
    for name, value in expected.items():
        assert float(values[name]) == pytest.approx(float(value), abs=1e-6), name
    assert ("val/top5" in values) == (classes > 5) and ("val/recall_of/c0" in values) == (classes <= 100)
    if classes <= 100:
        recall = multiclass_recall(probabilities, labels, classes, average=None)
        expected_recalls = {
            name: float(value) for name, value, has in zip(names, recall, has_images, strict=True) if has
        }
        prefix = "val/recall_of/"
        recalls = {name.removeprefix(prefix): float(values[name]) for name in values if name.startswith(prefix)}
        assert recalls == pytest.approx(expected_recalls)
    assert metrics.predictions.confidence.shape == (120,) and torch.equal(metrics.predictions.labels, labels)
    metrics.update(SingleLabel().loss(probabilities.log(), labels, None, 0.0), probabilities, labels)
    assert len(metrics.compute(CPU)) == len(values), "compute() resets the metrics"


@pytest.mark.parametrize("stage", ["train", "val"])
def test_batch_of_padding_adds_nothing(stage: str) -> None:
    metrics, empty = EpochMetrics(stage, SingleLabel(), list("abcdefg")), torch.zeros(0, 7)
    probabilities, labels = torch.eye(7)[:3], torch.tensor([0, 1, 1])
    metrics.update((torch.tensor(2.0), 3), probabilities, labels)
    metrics.update((torch.tensor(0.0), 0), empty, torch.zeros(0, dtype=torch.int64))
    values = metrics.compute(CPU)
    assert float(values[f"{stage}/accuracy"]) == pytest.approx(2 / 3)
    assert float(values[f"{stage}/loss"]) == pytest.approx(2 / 3)
