"""Labels that look wrong: what images of other classes are like, by the frozen features alone."""

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
from project.data.splits import place
from project.errors import ConfigError, DataError
from project.features.provider import RowComputation, RowProvider

NEIGHBOURS = 10
FOLDS = 5
TEMPERATURE = 0.1  # of the neighbours' votes, in cosines
PENALTY = 1e-3  # on the probes' squared weights: it keeps a wrong label from being learnt by heart


class Suspect(NamedTuple):
    """An image whose label looks wrong.

    Attributes:
        name: Its path.
        label: Its class, as labelled.
        looks_like: The class that it looks like.
        score: Probability of its label, less that of the likeliest other class: from -1, surely wrong, to 1.
        neighbour: The image of that class that is most like it.
    """

    name: str
    label: str
    looks_like: str
    score: float
    neighbour: str


def suspects_of(
    computation: RowComputation,
    data: ImageDataModule,
    facts: Mapping[str, ImageInfo],
    provider: RowProvider,
    most: int,
) -> list[Suspect]:
    """Find the labels of some data that look wrong: see :func:`find_suspects`.

    Args:
        computation: Of the frozen backbone that tells what images are like.
        data: The data, all splits of it.
        facts: What is known of each image, by its name; those that cannot be read are left out.
        provider: Provides their features.
        most: How many to return.

    Raises:
        ConfigError: None is to be returned, or scikit-learn is not installed.
        DataError: The data cannot be trained on, or no image can be read.
    """
    if most < 1:
        raise ConfigError(f"--top has to be at least 1, not {most}.")
    require_scikit_learn()
    source = data.source
    assert source is not None  # there would be no facts
    source.require()
    samples = [sample for split in source.splits.values() for sample in split if not facts[sample.name].error]
    if not samples:
        raise DataError("--suspects: no image can be read.")
    families = [where.family for _, where in place(samples, [facts[sample.name] for sample in samples], 0)]
    return find_suspects(provider.rows_of(computation, source, samples), samples, families, source.classes, most)


def require_scikit_learn() -> None:
    """Refuse a search for suspect labels without its library.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec("sklearn") is None:
        raise ConfigError("--suspects needs scikit-learn: pip install 'frozen-backbone[audit]'")


def find_suspects(
    features: torch.Tensor, samples: Sequence[Sample], families: Sequence[int], classes: Sequence[str], most: int
) -> list[Suspect]:
    """Find the labels that other images contradict most.

    Each image is judged by those that are not of its family, in two ways whose probabilities are averaged: by a probe
    that was trained on the other folds, and by a vote of its nearest neighbours. Labels are ranked by their margin, as
    in Northcutt and others, "Confident learning" (2021).

    Args:
        features: ``(N, D)``.
        samples: N samples.
        families: Number of each image's family: copies of one picture say nothing of each other.
        classes: Names of the classes.
        most: How many to return.

    Returns:
        The most suspect first; only those that look more like another class than like their own.
    """
    labels = torch.tensor([sample.label for sample in samples])
    family = torch.tensor(families)
    rows = functional.normalize(features - features.mean(0), dim=1)
    likely = (_probe(rows, labels, family, len(classes)) + _vote(rows, labels, family, len(classes))) / 2
    own = likely.gather(1, labels[:, None])[:, 0]
    others = likely.scatter(1, labels[:, None], -1.0)
    rival, looks = others.max(1)
    margin = own - rival
    found: list[Suspect] = []
    for at in margin.argsort()[:most].tolist():
        if margin[at] < 0:
            like = (rows @ rows[at]).masked_fill((labels != looks[at]) | (family == family[at]), -2.0)
            found.append(
                Suspect(
                    samples[at].name,
                    classes[int(labels[at])],
                    classes[int(looks[at])],
                    float(margin[at]),
                    samples[int(like.argmax())].name,
                )
            )
    return found


def _vote(rows: torch.Tensor, labels: torch.Tensor, family: torch.Tensor, classes: int) -> torch.Tensor:
    """Probabilities ``(N, C)`` by the nearest neighbours outside the family, the nearer the weightier."""
    found = torch.zeros(len(rows), classes)
    for at in range(0, len(rows), 1024):  # not all pairs at once
        part = slice(at, at + 1024)
        cosines = (rows[part] @ rows.T).masked_fill(family[part, None] == family, -torch.inf)
        nearest, who = cosines.topk(min(NEIGHBOURS, len(rows) - 1))
        weights = (nearest / TEMPERATURE).softmax(1).nan_to_num(0.0)
        found[part].scatter_add_(1, labels[who], weights)
    return found


def _probe(rows: torch.Tensor, labels: torch.Tensor, family: torch.Tensor, classes: int) -> torch.Tensor:
    """Probabilities ``(N, C)`` by linear probes, each image by the one that has not seen its family.

    Not ``cross_val_predict``: it fails where a class lies in one fold alone and leaves only one to train on.
    """
    linear_model, model_selection = import_module("sklearn.linear_model"), import_module("sklearn.model_selection")
    found = np.full((len(rows), classes), 1 / classes, np.float32)
    x, y, groups = rows.numpy(), labels.numpy(), family.numpy()
    count = min(FOLDS, len(np.unique(groups)), int(np.bincount(y).max()))
    folds = model_selection.StratifiedGroupKFold(count, shuffle=True, random_state=0).split if count > 1 else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class in y")
        parts = list(folds(x, y, groups)) if folds else []
    for seen, held in parts:
        if len(held) and len(np.unique(y[seen])) > 1:
            # Its penalty is that of the sum of the losses, PENALTY that of their mean.
            probe = linear_model.LogisticRegression(C=1 / (PENALTY * len(seen)), max_iter=200).fit(x[seen], y[seen])
            found[held] = 0
            found[np.ix_(held, probe.classes_)] = probe.predict_proba(x[held])
    return torch.from_numpy(found)
