"""Random draws depend on their key only, not on earlier draws."""

import random

import numpy as np
import torch

from project.runtime.seeding import derive_seed, reseed, restore_rng_state, rng_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [*torch.rand(3).tolist(), *np.random.rand(3).tolist(), random.random()]


def test_draws_depend_only_on_the_key() -> None:
    reseed(CPU, 7, "step", 2, 31, 0)
    first = draw()
    draw()
    reseed(CPU, 7, "step", 2, 31, 0)
    assert draw() == first
    reseed(CPU, 7, "step", 2, 32, 0)
    assert not set(draw()) & set(first)


def test_torch_draws_equal_those_of_manual_seed() -> None:
    reseed(CPU, 7, "step", 0, 0, 0)
    values = torch.rand(5)
    torch.manual_seed(derive_seed(7, "step", 0, 0, 0))
    assert torch.equal(torch.rand(5), values)


def test_different_keys_give_different_seeds() -> None:
    keys = [
        (seed, "step", epoch, batch, rank)
        for seed in (0, 1)
        for epoch in (0, 1, 11)
        for batch in (0, 1)
        for rank in (0, 1)
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_restored_generators_repeat_their_draws() -> None:
    state = rng_state()
    first = draw()
    assert draw() != first
    restore_rng_state(state)
    assert draw() == first
