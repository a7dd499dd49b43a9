import torch
from torch import nn

from project.models.l2_sp import L2SP


def test_penalty_is_half_alpha_times_the_squared_distance_from_the_pretrained_weights() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    pretrained = {name: value.detach().clone().float() for name, value in layer.named_parameters()}
    penalty = L2SP(0.25, layer.named_parameters())
    assert penalty(dict(layer.named_parameters())) == 0
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(1)
    value = penalty(dict(layer.named_parameters()))
    assert value.dtype == torch.float32
    distances = {name: value.detach().float() - pretrained[name] for name, value in layer.named_parameters()}
    torch.testing.assert_close(value, 0.125 * sum(distance.square().sum() for distance in distances.values()))
    value.backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, (0.25 * distances[name]).to(torch.bfloat16))
