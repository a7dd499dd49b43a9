"""SplitLoader: chooses between stored rows and images at the start of each epoch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from project import ImageClassifier, ImageDataModule, Trainer
from project.data.samplers import EpochOrder, EpochSampler
from project.data.split_loader import SplitLoader
from project.errors import ConfigError
from tests.callbacks.test_feature_cache import IGNORE_LIGHTNING_WARNINGS, silent_trainer
from tests.conftest import BACKBONE


class CountingFactory:
    """Creates DataLoaders over 6 numbers, and counts them."""

    count = 0
    epoch = 0

    def __call__(self) -> DataLoader[int]:
        self.count += 1
        return DataLoader(range(1000), 2, sampler=EpochSampler(EpochOrder(6, True)))  # type: ignore[arg-type]


@pytest.fixture
def factory() -> CountingFactory:
    return CountingFactory()


@pytest.fixture
def loader(factory: CountingFactory) -> SplitLoader:
    return SplitLoader(factory, lambda: factory.epoch)


def numbers(loader: SplitLoader) -> list[int]:
    return torch.cat(list(loader)).tolist()


def test_images_follow_the_order_of_the_epoch(loader: SplitLoader, factory: CountingFactory) -> None:
    first = numbers(loader)
    factory.epoch = 1
    second = numbers(loader)
    assert sorted(first) == list(range(6)) and sorted(second) == list(range(6, 12)), (
        "image i of epoch e has index 6 e + i"
    )
    assert first != [number - 6 for number in second]
    assert len(loader) == 3 and factory.count == 1, "one DataLoader for all epochs"
    loader.close()
    assert numbers(loader) == second and factory.count == 2


def test_rows_replace_images_until_they_are_removed(loader: SplitLoader, factory: CountingFactory) -> None:
    early = iter(loader)  # Lightning creates an iterator before the rows exist
    loader.rows = [10, 11]
    assert list(early) == list(loader) == [10, 11] and len(loader) == 2 and factory.count == 0
    loader.rows = None
    assert len(numbers(loader)) == 6


def test_setting_rows_does_not_affect_a_running_epoch(loader: SplitLoader) -> None:
    batches: Iterator[torch.Tensor] = iter(loader)
    next(batches)
    loader.rows = [10]
    assert sum(len(batch) for batch in batches) == 4


def test_each_split_keeps_one_loader(photos: Path) -> None:
    data = ImageDataModule(str(photos))
    assert data.train_dataloader() is data.train_dataloader() is data.loaders["train"]
    assert {data.val_dataloader(), data.test_dataloader()} == {data.loaders["val"], data.loaders["test"]}


@IGNORE_LIGHTNING_WARNINGS
def test_custom_loaders_do_not_use_stored_rows(photos: Path, weights: Path, here: Path) -> None:
    model, data = ImageClassifier(BACKBONE, str(weights), image_size=32), ImageDataModule(str(photos), num_workers=0)
    trainer: Trainer = silent_trainer()
    trainer.fit(model, datamodule=data)
    custom = DataLoader([(torch.zeros(3, 32, 32, dtype=torch.uint8), 0)] * 4, batch_size=2)
    with pytest.raises(ConfigError, match="the fit uses its own data loaders"):  # as an engine is asked for
        trainer.fit(model, custom, custom)
    assert data.loaders["train"].rows is None
