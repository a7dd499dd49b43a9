"""Collection of per-image validation predictions, with bounded memory and over several ranks."""

import numpy as np
import pytest
import torch

from project.evaluation.confusion import ImagePredictions, class_counts, confusion_matrix
from project.evaluation.metrics import class_scores
from project.evaluation.predictions import MAX_IMAGES, PredictionCollector, ValidationPredictions, merge_predictions

CLASSES = 4


def random_outputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(count, CLASSES, generator=generator).softmax(1)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return probabilities, labels, torch.arange(count * 3.0).view(count, 3)


def collect(
    count: int, points: int, batch: int = 5, rank: int = 0, world_size: int = 1, known: bool = True
) -> ValidationPredictions:
    """Predictions that a rank collects; padding is removed before the collector sees it."""
    probabilities, labels, features = random_outputs(count)
    per_rank = -(-count // world_size)
    indices = torch.arange(count)[rank::world_size]
    collector = PredictionCollector(per_rank if known else None, points, CLASSES, rank, world_size)
    for start in range(0, per_rank, batch):
        selected = indices[start : start + batch]
        collector.update(probabilities[selected], features[selected])
    labels = labels[indices]
    return collector.compute(ImagePredictions(*probabilities[indices].max(1), labels, labels >= 0))


@pytest.mark.parametrize("batch", [1, 5, 100])
@pytest.mark.parametrize("points", [0, 3, 7, 23, 500])
def test_collected_features_are_spread_over_the_split(points: int, batch: int) -> None:
    predictions = collect(23, points, batch)
    probabilities, labels, features = random_outputs(23)
    assert torch.equal(predictions.indices, torch.arange(23)) and torch.equal(predictions.labels, labels)
    assert torch.equal(predictions.confidence, probabilities.max(1).values)
    assert (
        torch.equal(predictions.probabilities, probabilities[predictions.probability_indices])
        and len(predictions.probability_indices) == 23
    )
    assert len(predictions.feature_indices) <= points
    assert (
        torch.equal(predictions.features, features[predictions.feature_indices])
        if points
        else predictions.features.numel() == 0
    )
    if points in (3, 7):
        assert predictions.feature_indices.max() >= 16, "the first images would be of the first classes only"


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_merged_predictions_of_several_ranks_equal_those_of_one(world_size: int) -> None:
    single = collect(23, 100)
    merged = merge_predictions([collect(23, 100, 4, rank, world_size) for rank in range(world_size)])
    for name in ("indices", "labels", "predicted", "confidence"):
        assert torch.equal(getattr(single, name), getattr(merged, name)), name
    probabilities, _, features = random_outputs(23)
    assert sorted(merged.feature_indices.tolist()) == list(range(23))
    assert torch.equal(merged.features, features[merged.feature_indices])
    assert torch.equal(merged.probabilities, probabilities[merged.probability_indices])


def test_rank_with_only_padding_adds_nothing() -> None:
    per_rank = [collect(1, 10, 4, rank, 2) for rank in range(2)]
    assert [len(predictions) for predictions in per_rank] == [1, 0]
    assert len(merge_predictions(per_rank)) == 1


@pytest.mark.parametrize("known", [True, False])
def test_memory_is_bounded_for_any_number_of_images(known: bool) -> None:
    count = 3 * MAX_IMAGES + 1
    predictions = collect(count, 50, 4096, known=known)
    assert len(predictions) == count, "labels and predictions of all images are available"
    assert len(predictions.probabilities) <= MAX_IMAGES and len(predictions.features) <= 50
    assert predictions.probabilities.untyped_storage().nbytes() <= MAX_IMAGES * CLASSES * 4


def test_counts_and_scores_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    predictions = collect(200, 0)
    labels = list(range(CLASSES + 1))  # the last class has no image and is never predicted
    matrix = confusion_matrix(predictions.labels, predictions.predicted, len(labels))
    assert (
        matrix.tolist() == metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=labels).tolist()
    )
    expected = metrics.precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=labels, zero_division=np.nan
    )
    counts = class_counts(predictions.labels, predictions.predicted, len(labels))
    assert [count.tolist() for count in counts] == [
        part.tolist() for part in (matrix.diagonal(), matrix.sum(1), matrix.sum(0))
    ]
    scores = class_scores(*counts)
    for values, name in zip(expected, ("precision", "recall", "f1"), strict=False):
        assert scores[name].tolist() == pytest.approx(list(values), nan_ok=True)


def test_errors_are_sorted_by_confidence_and_the_least_confident_are_first() -> None:
    predictions = collect(50, 0)
    wrong = predictions.most_confident_errors(10)
    assert not predictions.correct[wrong].any()
    assert (
        predictions.confidence[wrong].tolist()
        == sorted(predictions.confidence[~predictions.correct].tolist(), reverse=True)[:10]
    )
    assert (
        predictions.confidence[predictions.least_confident(5)].tolist() == sorted(predictions.confidence.tolist())[:5]
    )
