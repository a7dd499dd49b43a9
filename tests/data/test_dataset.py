"""ImageDataset and ImageLoader."""

import functools

import pytest
import torch

from project.data.dataset import ImageDataset, ImageLoader, collate
from project.data.sources.base import Sample
from project.data.sources.files import Files
from project.data.transforms import evaluation
from project.errors import DataError
from project.preprocessing import Preprocessing
from tests.conftest import draw, stop_workers


@pytest.fixture
def loader(tmp_path):
    draw(tmp_path / "good.png", (0, 0, 0), 0)
    (tmp_path / "bad.png").write_bytes(b"no image")
    samples = [Sample(str(tmp_path / name), 0) for name in ("good.png", "bad.png")]
    preprocessing = Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)
    dataset = ImageDataset(samples, Files(), evaluation(preprocessing))
    return functools.partial(ImageLoader, dataset, batch_size=1, collate_fn=collate)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_raises_the_same_error_with_and_without_workers(loader, workers, tmp_path):
    batches = iter(loader(num_workers=workers))
    images, labels, _ = next(batches)
    assert images.shape == (1, 3, 32, 32)
    assert labels.tolist() == [0]
    with pytest.raises(DataError) as caught:
        next(batches)
    bad = str(tmp_path / "bad.png")
    assert str(caught.value) == f"{bad} is not a readable image. Repair or remove it."
    assert caught.value.path == bad
    assert caught.value.reason == "is not a readable image."


def test_workers_start_when_the_iterator_is_created(loader):
    image_loader = loader(num_workers=1, persistent_workers=True)
    iter(image_loader)
    assert image_loader._iterator is not None
    assert isinstance(image_loader, torch.utils.data.DataLoader)
    stop_workers(image_loader)
