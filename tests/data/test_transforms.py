"""Transforms: random ones depend on the seed only, even while other threads draw; the resize has a fixed order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from project.data.transforms import SeededRandom, evaluation
from project.preprocessing import Preprocessing

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


def apply(step: v2.Transform, seed: int) -> torch.Tensor:
    with SeededRandom(seed):
        image = step(PICTURE)
    return v2.functional.pil_to_tensor(image) if isinstance(image, Image.Image) else image


@pytest.mark.parametrize("name", STEPS)
@settings(deadline=None, max_examples=8)
@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4, unique=True))
def test_equal_seeds_give_equal_images_in_concurrent_threads(name: str, seeds: list[int]) -> None:
    step = STEPS[name]
    sequential = [apply(step, seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            concurrent = list(pool.map(lambda seed: apply(step, seed), seeds))
            assert all(torch.equal(a, b) for a, b in zip(sequential, concurrent, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_seeds_give_different_images_and_do_not_change_the_global_rng_state(name: str) -> None:
    state = torch.get_rng_state()
    images = {apply(STEPS[name], seed).numpy().tobytes() for seed in range(20)}
    assert len(images) > 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (60, 50)])
@pytest.mark.parametrize("squash", [False, True])
def test_evaluation_resizes_horizontally_first(interpolation: str, size: tuple[int, int], squash: bool) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    preprocessing = Preprocessing(36, 32, interpolation, (0.5,) * 3, (0.5,) * 3, squash)
    width, height = (36, 36) if squash else (36 * size[0] // min(size), 36 * size[1] // min(size))
    resampling = Image.Resampling[interpolation.upper()]
    resized = image.resize((width, size[1]), resampling).resize((width, height), resampling)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    expected = np.asarray(resized)[top : top + 32, left : left + 32].transpose(2, 0, 1)
    assert np.array_equal(evaluation(preprocessing)(image).numpy(), expected)
