import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from project.models.backbone import load_backbone
from project.models.fingerprint import fingerprint

RANDOM = pytest.mark.filterwarnings("ignore:model.weights is null")


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).eval()


def of(module):
    return fingerprint([("body", module)])


def flip_lowest_bit(tensor):
    """The smallest change there is: one bit of one number."""
    integers = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor.detach().reshape(-1).view(integers)[-1] ^= 1


def test_fingerprint_is_64_hexadecimal_digits_and_the_same_each_time():
    network = small_network()
    assert len(of(network)) == 64
    assert int(of(network), 16)
    assert of(network) == of(network) == of(copy.deepcopy(network))


@pytest.mark.parametrize("name", list(small_network().state_dict()))
def test_one_bit_of_any_parameter_or_buffer_changes_the_fingerprint(name):
    network = small_network()
    before = of(network)
    tensor = network.state_dict()[name]
    flip_lowest_bit(tensor)
    assert of(network) != before
    flip_lowest_bit(tensor)
    assert of(network) == before


def test_negative_zero_is_not_zero():
    """``torch.equal`` does not tell them apart; bit-identical means that we do."""
    positive, negative = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((positive, 0.0), (negative, -0.0)):
        nn.init.constant_(module.weight, value)
        nn.init.zeros_(module.bias)
    assert of(positive) != of(negative)


def test_names_order_shapes_and_dtypes_count():
    network = small_network()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    tall.load_state_dict({"weight": wide.weight.detach().reshape(2, 3)})
    assert fingerprint([("stem", network)]) != fingerprint([("body", network)])
    assert fingerprint([("a", first), ("b", second)]) != fingerprint([("a", second), ("b", first)])
    assert of(wide) != of(tall)
    assert of(nn.Linear(2, 2).to(torch.bfloat16)) != of(nn.Linear(2, 2))


def test_memory_format_does_not_count():
    network = small_network()
    before = of(network)
    network.to(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()
    assert of(network) == before


def test_mode_and_requires_grad_do_not_count():
    network = small_network()
    before = of(network)
    assert of(network.train().requires_grad_(False)) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_device_does_not_count():
    network = small_network()
    before = of(network)
    assert of(network.cuda()) == before
    assert of(network.cpu()) == before


@RANDOM
def test_random_weights_are_the_same_each_time_whatever_the_seed_and_leave_the_seed_alone():
    torch.manual_seed(1)
    first = load_backbone("shufflenet_v2_x0_5", None)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(2)
    second = load_backbone("shufflenet_v2_x0_5", None)
    assert first.sha256 == second.sha256


@RANDOM
def test_random_weights_are_the_same_in_another_process():
    """A checkpoint of kilobytes that was trained on random features has to find them again."""
    code = (
        "import torch; torch.manual_seed(7); torch.rand(5)\n"
        "from project.models.backbone import load_backbone\n"
        "print(load_backbone('shufflenet_v2_x0_5', None).sha256)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == load_backbone("shufflenet_v2_x0_5", None).sha256
