"""What a validation keeps of its images: all of the little, some of the much, and the same of several processes."""

import numpy as np
import pytest
import torch

from project.evaluation.confusion import ImagePredictions
from project.evaluation.metrics import class_scores
from project.evaluation.predictions import MOST_IMAGES, PredictionCollector, ValidationPredictions, merge_predictions

CLASSES = 4


def images(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(count, CLASSES, generator=generator).softmax(1)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return probabilities, labels, torch.arange(count * 3.0).view(count, 3)


def collect(
    count: int, points: int, batch: int = 5, rank: int = 0, world: int = 1, known: bool = True
) -> ValidationPredictions:
    """What a process collects of its share; padding that fills it up is left out before."""
    probabilities, labels, features = images(count)
    share = -(-count // world)
    mine = torch.arange(count)[rank::world]
    collector = PredictionCollector(share if known else None, points, CLASSES, rank, world)
    for at in range(0, share, batch):
        these = mine[at : at + batch]
        collector.batch(probabilities[these], features[these])
    labels = labels[mine]
    return collector.outcome(ImagePredictions(*probabilities[mine].max(1), labels, labels >= 0))


@pytest.mark.parametrize("batch", [1, 5, 100])
@pytest.mark.parametrize("points", [0, 3, 7, 23, 500])
def test_points_come_from_all_over_the_split_with_their_own_features(points: int, batch: int) -> None:
    outcome = collect(23, points, batch)
    probabilities, labels, features = images(23)
    assert torch.equal(outcome.indices, torch.arange(23)) and torch.equal(outcome.labels, labels)
    assert torch.equal(outcome.confidence, probabilities.max(1).values)
    assert (
        torch.equal(outcome.probabilities, probabilities[outcome.probability_indices])
        and len(outcome.probability_indices) == 23
    )
    assert len(outcome.feature_indices) <= points
    assert torch.equal(outcome.features, features[outcome.feature_indices]) if points else outcome.features.numel() == 0
    if points in (3, 7):
        assert outcome.feature_indices.max() >= 16, "the first alone would be of the first classes"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_several_processes_find_what_one_does(world: int) -> None:
    alone, together = collect(23, 100), merge_predictions([collect(23, 100, 4, rank, world) for rank in range(world)])
    for name in ("indices", "labels", "predicted", "confidence"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
    _, _, features = images(23)
    assert sorted(together.feature_indices.tolist()) == list(range(23))
    assert torch.equal(together.features, features[together.feature_indices])
    assert torch.equal(together.probabilities, images(23)[0][together.probability_indices])


def test_a_process_with_padding_alone_adds_nothing() -> None:
    outcomes = [collect(1, 10, 4, rank, 2) for rank in range(2)]
    assert [len(outcome) for outcome in outcomes] == [1, 0]
    assert len(merge_predictions(outcomes)) == 1


@pytest.mark.parametrize("known", [True, False])
def test_memory_is_bounded_however_many_images_there_are(known: bool) -> None:
    count = 3 * MOST_IMAGES + 1
    outcome = collect(count, 50, 4096, known=known)
    assert len(outcome) == count, "of all of them the counts"
    assert len(outcome.probabilities) <= MOST_IMAGES and len(outcome.features) <= 50
    assert outcome.probabilities.untyped_storage().nbytes() <= MOST_IMAGES * CLASSES * 4


def test_counts_and_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    outcome = collect(200, 0)
    counts = outcome.counts(CLASSES + 1)  # one class has no image, and is never found
    labels = list(range(CLASSES + 1))
    assert counts.tolist() == metrics.confusion_matrix(outcome.labels, outcome.predicted, labels=labels).tolist()
    expected = metrics.precision_recall_fscore_support(
        outcome.labels, outcome.predicted, labels=labels, zero_division=np.nan
    )
    found = class_scores(counts.diagonal(), counts.sum(1), counts.sum(0))
    for values, name in zip(expected, ("precision", "recall", "f1"), strict=False):
        assert found[name].tolist() == pytest.approx(list(values), nan_ok=True)


def test_mistakes_come_with_the_surest_first_and_doubts_with_the_least_sure() -> None:
    outcome = collect(50, 0)
    wrong = outcome.mistakes(10)
    assert not outcome.correct[wrong].any()
    assert (
        outcome.confidence[wrong].tolist() == sorted(outcome.confidence[~outcome.correct].tolist(), reverse=True)[:10]
    )
    assert outcome.confidence[outcome.doubtful(5)].tolist() == sorted(outcome.confidence.tolist())[:5]
