"""What a transform draws comes from the seed it is given, whatever else draws at the same time."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from project.data.transforms import SeededRandom

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
STEPS = {
    "crop": v2.RandomResizedCrop(32, antialias=True),
    "flips": v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]),
    "trivial": v2.TrivialAugmentWide(),
    "rand": v2.RandAugment(),
    "auto": v2.AutoAugment(),
    "colours": v2.ColorJitter(0.5, 0.5, 0.5, 0.2),
    "erasing": v2.Compose([v2.PILToTensor(), v2.RandomErasing(1.0, value="random")]),
    "blur": v2.RandomApply([v2.GaussianBlur(3)]),
    "affine": v2.RandomAffine(30, (0.1, 0.1), (0.8, 1.2), 10),
    "perspective": v2.RandomPerspective(),
    "choice": v2.RandomChoice([v2.RandomRotation(90), v2.RandomGrayscale(0.5)]),
    "order": v2.RandomOrder([v2.RandomRotation(90), v2.RandomHorizontalFlip()]),
    "distortion": v2.RandomPhotometricDistort(),
    "elastic": v2.ElasticTransform(),
}


def draw(step: v2.Transform, seed: int) -> torch.Tensor:
    with SeededRandom(seed):
        image = step(PICTURE)
    return v2.functional.pil_to_tensor(image) if isinstance(image, Image.Image) else image


@pytest.mark.parametrize("name", STEPS)
@settings(deadline=None, max_examples=8)
@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4, unique=True))
def test_equal_seeds_draw_equal_images_from_four_threads_at_once(name: str, seeds: list[int]) -> None:
    step = STEPS[name]
    alone = [draw(step, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda seed: draw(step, seed), seeds))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_other_seeds_draw_other_images_and_leave_the_global_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    images = {draw(STEPS[name], seed).numpy().tobytes() for seed in range(20)}
    assert len(images) > 1
    assert torch.equal(torch.get_rng_state(), state)
