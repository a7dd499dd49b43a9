"""A population of heads takes the steps that each head takes alone."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from project.errors import ModelError
from project.models.head_population import HeadPopulation
from project.models.heads import CosineHead, LinearHead, MLPHead
from project.models.optimizers import construct_optimizer
from project.models.parameter_groups import stage_groups

CPU = torch.device("cpu")
RATES, DECAYS = [0.001, 0.01, 0.05], [0.0, 0.1, 0.01]


def adamw(head: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    """The optimizer of a fit."""
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": decay}}
    return construct_optimizer({"optimizer": spec, "scheduler": None}, stage_groups({"head": head}))[0]


class Normalized(nn.Sequential):
    """A head with buffers that change in training."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.BatchNorm1d(width), nn.Linear(width, classes))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (LinearHead, {}),
        (LinearHead, {"bias": False}),
        (MLPHead, {"hidden": 16, "dropout": 0.0}),
        (CosineHead, {}),
        (Normalized, {}),
    ],
)
def test_each_head_is_trained_as_if_alone(cls: type[nn.Module], arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = [cls(12, 4, **arguments) for _ in RATES]
    alone = copy.deepcopy(heads)
    population = HeadPopulation(heads, RATES, DECAYS, CPU)
    optimizers = [adamw(head, lr, decay) for head, lr, decay in zip(alone, RATES, DECAYS, strict=True)]
    for _ in range(20):
        features, labels = torch.randn(8, 12), torch.randint(0, 4, (8,))
        population.step(
            features,
            lambda logits: (
                functional.cross_entropy(
                    logits.flatten(0, 1),
                    labels.repeat_interleave(3),  # noqa: B023
                    reduction="sum",
                )
                / 8
            ),
        )
        for head, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
    features = torch.randn(5, 12)
    expected = torch.stack([head.eval()(features) for head in alone], 1)
    torch.testing.assert_close(population.logits(features), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_active_only_in_training_and_differs_between_heads() -> None:
    head = MLPHead(12, 4, hidden=64, dropout=0.5)
    population = HeadPopulation([head, head], [0.1, 0.1], [0, 0], CPU)
    features = torch.randn(5, 12)
    evaluated = population.logits(features)
    torch.testing.assert_close(evaluated[:, 0], head.eval()(features))
    assert torch.equal(evaluated[:, 0], evaluated[:, 1])
    trained = population.logits(features, training=True)
    assert not torch.equal(trained[:, 0], trained[:, 1])


class PartlyFrozen(nn.Module):
    """A head with a frozen and an unused parameter, and a layer of three-dimensional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(12), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1))
        self.grouped = nn.Linear(6, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.grouped((features * self.frozen).view(len(features), 2, 6)).flatten(1)


def test_only_used_parameters_with_a_gradient_are_trained() -> None:
    torch.manual_seed(0)
    head = PartlyFrozen()
    population = HeadPopulation([head, copy.deepcopy(head)], [0.1, 0.2], [0.1, 0.1], CPU)
    optimizer = adamw(head, 0.1, 0.1)
    features, labels = torch.randn(8, 12), torch.randint(0, 4, (8,))
    for _ in range(3):
        population.step(
            features, lambda logits: functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(2)) * 2
        )
        optimizer.zero_grad()
        functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    torch.testing.assert_close(population.logits(features)[:, 0], head(features), rtol=1e-4, atol=1e-5)


class SharedLayer(nn.Module):
    """A head whose first and last layers have tensors that are no parameters, so all heads have the same."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.offset = torch.randn(5, 12), torch.randn(5)
        self.trained = nn.Linear(5, 4)
        self.mixing, self.shift = torch.randn(4, 4), torch.randn(4)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(features * self.trained.bias.mean(), self.projection, self.offset)
        return functional.linear(self.trained(hidden), self.mixing, self.shift)


def test_tensors_that_all_heads_share() -> None:
    torch.manual_seed(0)
    first = SharedLayer()
    heads = [first, copy.deepcopy(first), copy.deepcopy(first)]
    for head in heads:
        nn.init.normal_(head.trained.bias)
    population, features = HeadPopulation(heads, RATES, DECAYS, CPU), torch.randn(8, 12)
    expected = torch.stack([head(features) for head in heads], 1)
    torch.testing.assert_close(population.logits(features), expected)


def test_the_given_heads_stay_as_they_are() -> None:
    head = LinearHead(12, 4)
    before = copy.deepcopy(head.state_dict())
    population = HeadPopulation([head, head], [0.1, 0.1], [0, 0], torch.device("meta"))
    assert population.logits(torch.randn(5, 12, device="meta")).shape == (5, 2, 4)
    population = HeadPopulation([head, head], [0.1, 0.1], [0, 0], CPU)
    population.step(torch.randn(5, 12), lambda logits: logits.square().sum())
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_heads_without_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="Identity has no parameters to train"):
        HeadPopulation([nn.Identity()], [0.1], [0.0], CPU)
