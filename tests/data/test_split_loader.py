"""One loader per split: whether it yields rows or images is decided when an epoch begins."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from project import ImageClassifier, ImageDataModule, Trainer
from project.data.samplers import EpochOrder, EpochSampler
from project.data.split_loader import SplitLoader
from project.errors import ConfigError
from tests.callbacks.test_feature_cache import AS_IT_SHOULD_BE, silent_trainer


class Opened:
    """Opens DataLoaders over 6 numbers, and counts them."""

    count = 0
    epoch = 0

    def __call__(self) -> DataLoader[int]:
        self.count += 1
        return DataLoader(range(1000), 2, sampler=EpochSampler(EpochOrder(6, True)))  # type: ignore[arg-type]


@pytest.fixture
def opened() -> Opened:
    return Opened()


@pytest.fixture
def loader(opened: Opened) -> SplitLoader:
    return SplitLoader(opened, lambda: opened.epoch)


def numbers(loader: SplitLoader) -> list[int]:
    return torch.cat(list(loader)).tolist()


def test_images_come_in_the_order_of_the_epoch(loader: SplitLoader, opened: Opened) -> None:
    first = numbers(loader)
    opened.epoch = 1
    second = numbers(loader)
    assert sorted(first) == list(range(6)) and sorted(second) == list(range(6, 12)), "image i of epoch e is 6 e + i"
    assert first != [number - 6 for number in second]
    assert len(loader) == 3 and opened.count == 1, "one DataLoader, and its processes, for all epochs"
    loader.close()
    assert numbers(loader) == second and opened.count == 2


def test_rows_take_the_place_of_images_until_they_are_taken_away(loader: SplitLoader, opened: Opened) -> None:
    waiting = iter(loader)  # as Lightning does before a fit starts
    loader.rows = [10, 11]
    assert list(waiting) == list(loader) == [10, 11] and len(loader) == 2 and opened.count == 0
    loader.rows = None
    assert len(numbers(loader)) == 6


def test_an_epoch_that_has_begun_ends_with_what_it_began_with(loader: SplitLoader) -> None:
    batches: Iterator[torch.Tensor] = iter(loader)
    next(batches)
    loader.rows = [10]
    assert sum(len(batch) for batch in batches) == 4


def test_each_split_has_one_loader_for_all_runs(photos: Path) -> None:
    data = ImageDataModule(str(photos))
    assert data.train_dataloader() is data.train_dataloader() is data.loaders["train"]
    assert {data.val_dataloader(), data.test_dataloader()} == {data.loaders["val"], data.loaders["test"]}


@AS_IT_SHOULD_BE
def test_no_rows_are_stored_for_loaders_of_the_users_own(photos: Path, weights: Path, here: Path) -> None:
    model, data = ImageClassifier("resnet18", str(weights), image_size=32), ImageDataModule(str(photos), num_workers=0)
    trainer: Trainer = silent_trainer()
    trainer.fit(model, datamodule=data)
    own = DataLoader([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 4, batch_size=2)
    with pytest.raises(ConfigError, match="the fit was given loaders of its own"):  # as an engine is asked for
        trainer.fit(model, own, own)
    assert data.loaders["train"].rows is None
