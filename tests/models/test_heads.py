import math

import pytest
import torch
from torch import nn

from project.errors import CheckpointError, ConfigError
from project.models import heads
from project.models.heads import CosineHead, KNNHead, LinearHead, MLPHead, PrototypeHead

HEADS = (LinearHead, MLPHead, CosineHead)


@pytest.mark.parametrize("head", HEADS)
def test_head_maps_features_to_logits(head):
    logits = head(8, 3)(torch.randn(5, 8))
    assert logits.shape == (5, 3)
    assert logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    module = head(8, 3)
    module(torch.randn(5, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_head_separates_two_gaussians(head):
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 8) + 6 * nn.functional.one_hot(labels, 8)
    module = head(8, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(features), labels).backward()
        optimizer.step()
    assert (module.eval()(features).argmax(1) == labels).float().mean() > 0.95


def test_linear_head_equals_a_linear_layer():
    head = LinearHead(8, 3)
    features = torch.randn(5, 8)
    assert isinstance(head, nn.Linear)
    assert torch.equal(head(features), nn.functional.linear(features, head.weight, head.bias))
    assert LinearHead(8, 3, bias=False).bias is None


def test_mlp_head_applies_dropout_only_in_training():
    head = MLPHead(8, 3, hidden=64, dropout=0.5)
    features = torch.randn(5, 8)
    assert not torch.equal(head.train()(features), head(features))
    assert torch.equal(head.eval()(features), head(features))


def test_cosine_logits_are_bounded_and_independent_of_feature_norm():
    head = CosineHead(8, 3, scale=7.0)
    features = torch.randn(50, 8)
    logits = head(features)
    assert logits.abs().max() <= 7 * (1 + 1e-5)
    assert torch.allclose(head(features * 123), logits, atol=1e-4)
    assert torch.allclose(head(head.weight.detach()).diagonal(), torch.tensor(7.0))


def gaussians(rows: int = 60, width: int = 8, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    centers = torch.randn(classes, width, generator=generator)
    return centers[labels] + 0.3 * torch.randn(rows, width, generator=generator), labels


def batches(features, labels, size=7):
    return list(zip(features.split(size), labels.split(size), strict=True))


def test_prototypes_are_the_means_of_the_directions():
    features, labels = gaussians()
    head = PrototypeHead(8, 3, scale=5.0)
    head.fit(batches(features, labels))
    directions = nn.functional.normalize(features, dim=1)
    means = torch.stack([directions[labels == label].mean(0) for label in range(3)])
    torch.testing.assert_close(head.means, means)
    torch.testing.assert_close(head(features), -5 * torch.cdist(directions, means).square(), atol=1e-4, rtol=1e-4)
    assert (head(features).argmax(1) == labels).float().mean() > 0.9
    torch.testing.assert_close(head(features), head(3 * features))


def test_cosine_head_starts_from_the_prototypes():
    features, labels = gaussians()
    head, prototypes = CosineHead(8, 3), PrototypeHead(8, 3)
    for module in (head, prototypes):
        module.fit(batches(features, labels))
    torch.testing.assert_close(head.weight.detach(), prototypes.means)
    assert head.weight.requires_grad


@pytest.mark.parametrize("k", [1, 5, 1000], ids=["nearest", "five", "more than rows"])
@pytest.mark.parametrize("part", [4, 8192], ids=["rows in parts", "rows at once"])
def test_neighbors_vote_with_their_similarity(k, part, monkeypatch):
    monkeypatch.setattr(heads, "NEIGHBOR_ROWS", part)
    features, labels = gaussians()
    head = KNNHead(8, 3, k=k, temperature=0.1)
    head.fit(batches(features, labels))
    queries = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    rows = nn.functional.normalize(features, dim=1).half().float()
    similarities, places = (nn.functional.normalize(queries, dim=1) @ rows.T).topk(min(k, 60))
    votes = (similarities / 0.1).exp()[..., None] * nn.functional.one_hot(labels[places], 3)
    shares = votes.sum(1) / votes.sum((1, 2))[:, None]
    expected = (min(k, 60) * shares + 1 / 3) / (min(k, 60) + 1)
    torch.testing.assert_close(head(queries).softmax(1), expected, atol=1e-4, rtol=1e-3)
    assert head.rows.dtype == torch.float16


def test_too_many_rows_are_refused():
    with pytest.raises(ConfigError, match=r"KNNHead would store more than 59 training rows .*max_rows"):
        KNNHead(8, 3, max_rows=59).fit(batches(*gaussians()))


@pytest.mark.parametrize(
    ("head", "name", "values"),
    [
        (MLPHead, "hidden", [0, -3]),
        (MLPHead, "dropout", [-0.1, 1.0, math.nan]),
        (CosineHead, "scale", [0.0, math.inf, math.nan]),
        (PrototypeHead, "scale", [0.0, math.inf, math.nan]),
        (KNNHead, "k", [0]),
        (KNNHead, "temperature", [0.0, math.inf, math.nan]),
        (KNNHead, "max_rows", [0]),
    ],
)
def test_arguments_out_of_range_are_refused(head, name, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name} must be .*, not {value}\.$"):
            head(8, 3, **{name: value})


@pytest.mark.parametrize("head", [PrototypeHead, KNNHead])
def test_bf16_tells_near_classes_apart(head):
    """The cosine similarities of rows of different classes differ from 1 by less than the precision of bf16."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.ones(40, 16) + 0.01 * torch.randn(40, 16, generator=generator)
    features[:, 0] += 0.1 * labels
    module = head(16, 2)
    module.fit(batches(features, labels))
    with torch.autocast("cpu", torch.bfloat16):
        logits = module(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, module(features))
    assert torch.equal(logits.argmax(1), labels)


def test_a_saved_head_is_resized_before_it_is_loaded():
    head, copy = KNNHead(8, 3), KNNHead(8, 3)
    head.fit(batches(*gaussians()))
    copy.resize(head.state_dict())
    copy.load_state_dict(head.state_dict())
    queries = torch.randn(10, 8)
    assert torch.equal(copy(queries), head(queries))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.full((60,), 3)},
        {"labels": torch.full((60,), -1)},
        {"labels": torch.zeros(59, dtype=torch.int64)},
        {"labels": torch.zeros(60)},
        {"labels": torch.tensor(0)},
        {"rows": torch.zeros(0, 8)},
        {"rows": torch.tensor(0.0)},
        {"rows": torch.tensor(0.0), "labels": torch.tensor(0)},
    ],
    ids=["unknown class", "negative", "other count", "float", "label scalar", "no rows", "row scalar", "scalars"],
)
def test_damaged_rows_are_refused(change):
    head = KNNHead(8, 3)
    head.fit(batches(*gaussians()))
    with pytest.raises(CheckpointError, match="KNNHead has no valid rows and labels"):
        KNNHead(8, 3).resize({**head.state_dict(), **change})
