"""What is random is drawn again the same way at the same place, whatever was drawn before."""

import random

import numpy as np
import torch

from project.runtime.seeding import reseed, seed_at

CPU = torch.device("cpu")


def drawn() -> list[float]:
    return [*torch.rand(3).tolist(), *np.random.rand(3).tolist(), random.random()]


def test_what_is_drawn_at_a_place_depends_on_the_place_alone() -> None:
    reseed(CPU, 7, "step", 2, 31, 0)
    first = drawn()
    drawn()
    reseed(CPU, 7, "step", 2, 31, 0)
    assert drawn() == first
    reseed(CPU, 7, "step", 2, 32, 0)
    assert not set(drawn()) & set(first)


def test_torch_draws_what_it_would_with_manual_seed() -> None:
    reseed(CPU, 7, "step", 0, 0, 0)
    ours = torch.rand(5)
    torch.manual_seed(seed_at(7, "step", 0, 0, 0))
    assert torch.equal(torch.rand(5), ours)


def test_places_are_told_apart() -> None:
    places = [
        (seed, "step", epoch, batch, rank)
        for seed in (0, 1)
        for epoch in (0, 1, 11)
        for batch in (0, 1)
        for rank in (0, 1)
    ]
    assert len({seed_at(*place) for place in places}) == len(places)
