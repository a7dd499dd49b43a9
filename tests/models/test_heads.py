import pytest
import torch
from torch import nn

from project.models.heads import CosineHead, LinearHead, MLPHead

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
