"""Label issues: find images whose frozen features contradict their label."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from project.data.datamodule import ImageDataModule
from project.data.image_index import ImageInfo
from project.data.sources.base import Sample
from project.data.splits import assign_places
from project.errors import ConfigError, DataError
from project.features.frozen_prefix import PrefixSpec
from project.features.provider import RowProvider

NEIGHBOURS = 10
FOLDS = 5
TEMPERATURE = 0.1  # softmax temperature of the neighbours' cosine similarities
PENALTY = 1e-3  # L2 penalty of the probes, which keeps them from memorizing wrong labels


class Suspect(NamedTuple):
    """An image whose label is probably wrong.

    Attributes:
        name: Path of the image.
        label: Its label.
        looks_like: The class predicted instead.
        score: Probability of the label minus that of ``looks_like``, in [-1, 0). The lowest is the most suspect.
        neighbour: The most similar image of that class.
    """

    name: str
    label: str
    looks_like: str
    score: float
    neighbour: str


def suspects_of(
    prefix: PrefixSpec, data: ImageDataModule, infos: Mapping[str, ImageInfo], provider: RowProvider, limit: int
) -> list[Suspect]:
    """Find label issues in all splits of the data: see :func:`find_suspects`.

    Args:
        prefix: Computes the features with the frozen backbone.
        data: The data.
        infos: Properties of each image, by name. Images that cannot be read are skipped.
        provider: Stores the features.
        limit: Maximum number of suspects.

    Raises:
        ConfigError: The limit is less than 1, or scikit-learn is not installed.
        DataError: The data cannot be trained on, or no image can be read.
    """
    if limit < 1:
        raise ConfigError(f"--top must be at least 1, got {limit}.")
    require_scikit_learn()
    source = data.source
    assert source is not None  # there are no infos without a source
    source.require()
    samples = [sample for split in source.splits.values() for sample in split if not infos[sample.name].error]
    if not samples:
        raise DataError("--suspects: no image can be read.")
    clusters = [place.cluster for _, place in assign_places(samples, [infos[sample.name] for sample in samples], 0)]
    return find_suspects(provider.encode_samples(prefix, source, samples), samples, clusters, source.classes, limit)


def require_scikit_learn() -> None:
    """Raise if scikit-learn, which finds label issues, is not installed.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec("sklearn") is None:
        raise ConfigError("--suspects needs scikit-learn: pip install 'frozen-backbone[audit]'")


def find_suspects(
    features: torch.Tensor, samples: Sequence[Sample], clusters: Sequence[int], classes: Sequence[str], limit: int
) -> list[Suspect]:
    """Find the labels that the features contradict most.

    Class probabilities of each image are the mean of two estimates from images outside its cluster: a linear probe
    trained on the other folds, and a weighted vote of the nearest neighbours. Labels are ranked by their margin, as in
    Northcutt et al., "Confident learning" (2021).

    Args:
        features: ``(N, D)``.
        samples: N samples.
        clusters: Cluster of each image. Near-duplicates are in one cluster, so that a copy does not confirm a label.
        classes: Class names.
        limit: Maximum number of suspects.

    Returns:
        Images whose label is less probable than another class, the most suspect first.
    """
    labels = torch.tensor([sample.label for sample in samples])
    cluster = torch.tensor(clusters)
    rows = functional.normalize(features - features.mean(0), dim=1)
    by_probe, by_vote = (estimate(rows, labels, cluster, len(classes)) for estimate in (_probe, _neighbour_vote))
    probabilities = (by_probe + by_vote) / 2
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    best_other, predicted = probabilities.scatter(1, labels[:, None], -1.0).max(1)
    margins = of_label - best_other
    suspects: list[Suspect] = []
    for index in margins.argsort()[:limit].tolist():
        if margins[index] < 0:
            candidates = (labels == predicted[index]) & (cluster != cluster[index])
            similarity = (rows @ rows[index]).masked_fill(~candidates, -2.0)
            suspects.append(
                Suspect(
                    samples[index].name,
                    classes[int(labels[index])],
                    classes[int(predicted[index])],
                    float(margins[index]),
                    samples[int(similarity.argmax())].name,
                )
            )
    return suspects


def _neighbour_vote(rows: torch.Tensor, labels: torch.Tensor, cluster: torch.Tensor, classes: int) -> torch.Tensor:
    """Class probabilities ``(N, C)`` from the nearest neighbours outside the cluster, weighted by similarity."""
    probabilities = torch.zeros(len(rows), classes)
    for begin in range(0, len(rows), 1024):  # bounds the memory for all pairs
        part = slice(begin, begin + 1024)
        cosines = (rows[part] @ rows.T).masked_fill(cluster[part, None] == cluster, -torch.inf)
        nearest, indices = cosines.topk(min(NEIGHBOURS, len(rows) - 1))
        weights = (nearest / TEMPERATURE).softmax(1).nan_to_num(0.0)
        probabilities[part].scatter_add_(1, labels[indices], weights)
    return probabilities


def _probe(rows: torch.Tensor, labels: torch.Tensor, cluster: torch.Tensor, classes: int) -> torch.Tensor:
    """Class probabilities ``(N, C)`` from linear probes, each image by a probe trained without its cluster.

    ``cross_val_predict`` would fail if a class is in one fold only and a single class is left to train on.
    """
    linear_model, model_selection = import_module("sklearn.linear_model"), import_module("sklearn.model_selection")
    probabilities = np.full((len(rows), classes), 1 / classes, np.float32)
    x, y, groups = rows.numpy(), labels.numpy(), cluster.numpy()
    folds = min(FOLDS, len(np.unique(groups)), int(np.bincount(y).max()))
    parts = []
    if folds > 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class in y")
            splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=0)
            parts = list(splitter.split(x, y, groups))
    for train, held_out in parts:
        if len(held_out) and len(np.unique(y[train])) > 1:
            # scikit-learn applies 1 / C to the sum of the losses, PENALTY applies to their mean.
            probe = linear_model.LogisticRegression(C=1 / (PENALTY * len(train)), max_iter=200).fit(x[train], y[train])
            probabilities[held_out] = 0
            probabilities[np.ix_(held_out, probe.classes_)] = probe.predict_proba(x[held_out])
    return torch.from_numpy(probabilities)
