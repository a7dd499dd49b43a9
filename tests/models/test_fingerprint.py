import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from project.models.fingerprint import fingerprint
from project.models.loading import load_backbone

RANDOM = pytest.mark.filterwarnings("ignore:model.weights is null")


def small_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).eval()


def sha256(module):
    return fingerprint([("body", module)])


def flip_lowest_bit(tensor):
    integers = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor.detach().reshape(-1).view(integers)[-1] ^= 1


def test_fingerprint_is_64_hexadecimal_digits_and_deterministic():
    network = small_network()
    assert len(sha256(network)) == 64
    assert int(sha256(network), 16)
    assert sha256(network) == sha256(network) == sha256(copy.deepcopy(network))


@pytest.mark.parametrize("name", list(small_network().state_dict()))
def test_flipping_one_bit_of_any_parameter_or_buffer_changes_the_fingerprint(name):
    network = small_network()
    before = sha256(network)
    tensor = network.state_dict()[name]
    flip_lowest_bit(tensor)
    assert sha256(network) != before
    flip_lowest_bit(tensor)
    assert sha256(network) == before


def test_negative_zero_changes_the_fingerprint():
    """``torch.equal`` treats -0.0 and 0.0 as equal, but they are not bit-identical."""
    positive, negative = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((positive, 0.0), (negative, -0.0)):
        nn.init.constant_(module.weight, value)
        nn.init.zeros_(module.bias)
    assert sha256(positive) != sha256(negative)


def test_fingerprint_depends_on_names_order_shapes_and_dtypes():
    network = small_network()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    wide, tall = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    tall.load_state_dict({"weight": wide.weight.detach().reshape(2, 3)})
    assert fingerprint([("stem", network)]) != fingerprint([("body", network)])
    assert fingerprint([("a", first), ("b", second)]) != fingerprint([("a", second), ("b", first)])
    assert sha256(wide) != sha256(tall)
    assert sha256(nn.Linear(2, 2).to(torch.bfloat16)) != sha256(nn.Linear(2, 2))


def test_fingerprint_does_not_depend_on_memory_format():
    network = small_network()
    before = sha256(network)
    network.to(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()
    assert sha256(network) == before


def test_fingerprint_does_not_depend_on_mode_and_requires_grad():
    network = small_network()
    before = sha256(network)
    assert sha256(network.train().requires_grad_(False)) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_fingerprint_does_not_depend_on_device():
    network = small_network()
    before = sha256(network)
    assert sha256(network.cuda()) == before
    assert sha256(network.cpu()) == before


@RANDOM
def test_random_weights_do_not_depend_on_or_change_the_global_rng_state():
    torch.manual_seed(1)
    first = load_backbone("shufflenet_v2_x0_5", None)
    numbers = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(numbers, torch.rand(3))
    torch.manual_seed(2)
    second = load_backbone("shufflenet_v2_x0_5", None)
    assert first.sha256 == second.sha256


@RANDOM
def test_random_weights_are_equal_in_another_process():
    """Checkpoints do not contain frozen weights, so random ones must be reproducible."""
    code = (
        "import torch; torch.manual_seed(7); torch.rand(5)\n"
        "from project.models.loading import load_backbone\n"
        "print(load_backbone('shufflenet_v2_x0_5', None).sha256)"
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert process.stdout.strip() == load_backbone("shufflenet_v2_x0_5", None).sha256
