"""Scores of the candidates of a sweep on folds of the training images, which are held out in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from project.config.class_path import ClassSpec
from project.data.samplers import EpochOrder
from project.errors import ConfigError
from project.models.head_bank import Coordinates, TrainingRows
from project.models.head_population import HeadPopulation
from project.models.head_solver import cross_validate
from project.models.readout import FeatureKind
from project.runtime.seeding import reseed
from project.studies.search_space import HeadSettings
from project.task import Task

EVALUATED_ROWS = 1024  # rows to score at once


@dataclass(frozen=True)
class LabelledRows:
    """The training images of a sweep.

    Attributes:
        features: Features of each kind, float32 ``(N, D)``, on the device of the solver.
        labels: int64 ``(N,)``, on that device.
        folds: Cross-validation fold of each image, int64 ``(N,)``, on the CPU; negative for images that are never held
            out.
        held_out: Number of folds to hold out in turn, to score the candidates on.
        num_classes: Number C of classes.
        class_weights: Weight of each class in the loss, float32 ``(C,)``, on the device of the features, or ``None``.
        sampling_weights: Weight of each image in a balanced sampler, float32 ``(N,)``, on the CPU, or ``None``.
        importance: How much an image of each class counts in the loss, and in the scores, float32 ``(C,)``, on the
            device of the features.
    """

    features: Mapping[FeatureKind, torch.Tensor]
    labels: torch.Tensor
    folds: torch.Tensor
    held_out: int
    num_classes: int
    class_weights: torch.Tensor | None
    sampling_weights: torch.Tensor | None
    importance: torch.Tensor

    @property
    def fold_count(self) -> int:
        """Number of folds."""
        return int(self.folds.max()) + 1

    @property
    def scored_weights(self) -> torch.Tensor:
        """Importance of each image of the folds to hold out, float64 on the CPU."""
        scored = (self.folds >= 0) & (self.folds < self.held_out)
        return self.importance.cpu().double()[self.labels.cpu()[scored]]


@dataclass(frozen=True)
class Recipe:
    """What all trained candidates share.

    Attributes:
        task: Gives the loss and the predictions.
        batch_size: Images per step.
        epochs: Maximum number of epochs.
        seed: Seed of the initial heads, the order of the images and dropout.
    """

    task: Task
    batch_size: int
    epochs: int
    seed: int


def train_population(settings: Sequence[HeadSettings], rows: LabelledRows, fold: int, recipe: Recipe) -> torch.Tensor:
    """Train candidates of one head class and kind of features, and score them after each epoch on a held-out fold.

    Args:
        settings: K candidates.
        rows: The training images.
        fold: The fold to hold out.
        recipe: Settings of all candidates.

    Returns:
        Accuracy and mean loss on the held-out fold after each epoch, float64 ``(K, E, 2)``.
    """
    features, first, task = rows.features[settings[0].features], settings[0], recipe.task
    train, held_out = (torch.nonzero(mask)[:, 0] for mask in (rows.folds != fold, rows.folds == fold))
    key = (recipe.seed, "sweep", first.head.class_path, first.features, fold)
    reseed(features.device, *key, "initial heads")
    heads = [make_head(first.head, features.shape[1], rows.num_classes) for _ in settings]
    rates, decays = ([float(getattr(one, name) or 0) for one in settings] for name in ("lr", "weight_decay"))
    population = HeadPopulation(heads, rates, decays, features.device)
    weights = rows.sampling_weights
    order = EpochOrder(
        len(train), True, recipe.seed, None if weights is None else weights[train], batch_size=recipe.batch_size
    )
    smoothings = [one.label_smoothing for one in settings]

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        for smoothing in sorted({*smoothings}):
            members = [index for index, value in enumerate(smoothings) if value == smoothing]
            part, repeated = logits[:, members].flatten(0, 1), labels.repeat_interleave(len(members))
            summed, divisor = task.loss(part, repeated, rows.class_weights, smoothing)
            total = total + summed / (divisor / len(members))
        return total

    sums = torch.zeros(len(settings), recipe.epochs, 3, dtype=torch.float64)
    for epoch in range(recipe.epochs):
        reseed(features.device, *key, epoch)
        for indices in torch.split(train[order(epoch).indices], recipe.batch_size):
            labels = rows.labels[indices]
            population.step(features[indices], lambda logits, labels=labels: loss(logits, labels))  # type: ignore[misc]
        for indices in torch.split(held_out, EVALUATED_ROWS):
            with torch.no_grad():
                logits = population.logits(features[indices]).float()
                sums[:, epoch] += _weighted_sums(logits, rows.labels[indices], rows.importance, task)
    return sums[..., :2] / sums[..., 2:]


def validate_head(head: ClassSpec, width: int, classes: int, device: torch.device) -> None:
    """Train two heads of a class for a step on random features.

    Args:
        head: Class of the heads.
        width: Width of the features.
        classes: Number of classes.
        device: Device of the features.

    Raises:
        ConfigError: The class is not allowed, does not accept the arguments, or cannot be trained in a batch.
    """
    heads = [make_head(head, width, classes) for _ in range(2)]
    try:
        population = HeadPopulation(heads, [0.1, 0.1], [0.0, 0.0], device)
        population.step(torch.randn(2, width, device=device), lambda logits: logits.flatten(0, 1).logsumexp(1).sum())
    except Exception as error:  # a class may raise anything
        reason = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
        raise ConfigError(
            f"space.head: {head.name} cannot be trained in a batch with others ({reason}).\n"
            "Remove it from --space.head."
        ) from error


def make_head(head: ClassSpec, width: int, classes: int) -> nn.Module:
    """Construct a head.

    Raises:
        ConfigError: The class is not allowed, or does not accept the arguments.
    """
    made: nn.Module = head.construct("space.head", nn.Module, width, classes)
    return made


def _weighted_sums(logits: torch.Tensor, labels: torch.Tensor, importance: torch.Tensor, task: Task) -> torch.Tensor:
    """Weighted sums of correct images and of losses of K heads, and the sum of weights, float64 ``(K, 3)`` on the CPU.

    They are sums of the same kind in the same order, so that no accuracy exceeds 1.

    Args:
        logits: ``(B, K, C)``; overwritten.
        labels: ``(B,)``.
        importance: Weight of each class ``(C,)``.
        task: Gives the loss and the predictions.
    """
    weights = importance[labels]
    finite = logits.isfinite().all(2)
    predicted = task.predict(logits.flatten(0, 1)).label.view(logits.shape[:2])
    correct = weights[:, None] * (finite & (predicted == labels[:, None]))
    targets = task.target_weights(labels, logits.shape[2], None, 0.0) * weights[:, None]
    losses, _ = task.loss_and_gradient(logits, targets)
    losses = torch.where(finite, losses, torch.inf)  # a head that has diverged
    return torch.stack([correct, losses, weights[:, None].expand_as(correct)], 2).sum(0, dtype=torch.float64).cpu()


def solve_candidate(kind: FeatureKind, rows: LabelledRows, task: Task) -> torch.Tensor:
    """Score the solved head of a kind of features: see ``model.head_init``.

    Its penalty is chosen on all images, not on a sample of many as in a fit: all candidates have the same held-out
    images, and a sweep trains the others for longer.

    Args:
        kind: The kind of features.
        rows: The training images.
        task: Gives the loss.

    Returns:
        Accuracy and mean loss on each held-out fold, float64 ``(F, 2)``.
    """
    features = rows.features[kind]

    def targets(labels: torch.Tensor) -> torch.Tensor:
        return task.target_weights(labels, rows.num_classes, None, 0.0) * rows.importance[labels][:, None]

    training = TrainingRows(features.__getitem__, rows.labels, rows.folds.to(features.device), targets)
    scores = cross_validate(training, Coordinates(training, bias=True), task, rows.num_classes, rows.fold_count)
    best = min(scores, key=lambda score: score.loss)
    return torch.stack([best.accuracies, best.losses], 1).cpu()
