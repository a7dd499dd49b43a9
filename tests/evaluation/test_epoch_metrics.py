"""Every metric of an epoch is derived from one answer per image, and equals torchmetrics' own."""

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
def test_metrics_are_those_of_torchmetrics(classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    probabilities = torch.randn(120, classes, generator=generator).mul(sharpness).softmax(1)
    labels = torch.randint(0, max(classes - 1, 2), (120,), generator=generator)  # of four and more, one has no image
    names = [f"c{number}" for number in range(classes)]
    metrics = EpochMetrics("val", SingleLabel(), names)
    for part, targets in zip(probabilities.split(50), labels.split(50), strict=True):
        loss = SingleLabel().loss(part.log(), targets, None, 0.0)
        metrics.add(loss, part, targets)
    found = metrics.take(CPU)
    there = torch.bincount(labels, minlength=classes) > 0  # a class without an image has no recall and no F1
    expected = {
        "val/loss": torch.nn.functional.nll_loss(probabilities.log(), labels),
        "val/accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro"),
        "val/f1": multiclass_f1_score(probabilities, labels, classes, average="none")[there].mean(),
        "val/ece": multiclass_calibration_error(probabilities, labels, classes, n_bins=15),
    }
    if classes > 5:
        expected["val/top5"] = multiclass_accuracy(probabilities, labels, classes, average="micro", top_k=5)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), abs=1e-6), name
    assert ("val/top5" in found) == (classes > 5) and ("val/recall_of/c0" in found) == (classes <= 100)
    if classes <= 100:
        recall = multiclass_recall(probabilities, labels, classes, average=None)
        wanted = {name: float(value) for name, value, has in zip(names, recall, there, strict=True) if has}
        recalls = {name: float(found[f"val/recall_of/{name}"]) for name in names if f"val/recall_of/{name}" in found}
        assert recalls == pytest.approx(wanted)
    assert metrics.each.confidence.shape == (120,) and torch.equal(metrics.each.labels, labels)
    metrics.add(SingleLabel().loss(probabilities.log(), labels, None, 0.0), probabilities, labels)
    assert len(metrics.take(CPU)) == len(found), "an epoch begins anew"


@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_process_with_nothing_but_padding_adds_nothing(stage: str) -> None:
    metrics, nothing = EpochMetrics(stage, SingleLabel(), list("abcdefg")), torch.zeros(0, 7)
    probabilities, labels = torch.eye(7)[:3], torch.tensor([0, 1, 1])
    metrics.add((torch.tensor(2.0), 3), probabilities, labels)
    metrics.add((torch.tensor(0.0), 0), nothing, torch.zeros(0, dtype=torch.int64))
    values = metrics.take(CPU)
    assert float(values[f"{stage}/accuracy"]) == pytest.approx(2 / 3)
    assert float(values[f"{stage}/loss"]) == pytest.approx(2 / 3)
