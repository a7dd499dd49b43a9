from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from project.data.datamodule import ImageDataModule
from project.data.sources import Digits, Folder
from project.data.transforms import evaluation, training
from project.errors import ConfigError
from project.preprocessing import Preprocessing
from tests.conftest import draw

PREPROCESSING = Preprocessing(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_batches_are_uint8_images_and_labels(photos: Path) -> None:
    data = ImageDataModule(root=str(photos), batch_size=5, num_workers=0)
    data.preprocessing = PREPROCESSING
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 0, 1]
    assert sum(len(batch[1]) for batch in data.train_dataloader()) == 24


def test_classes_are_those_of_train_in_every_split(tmp_path: Path) -> None:
    for path in ("train/ants", "train/bees", "train/cats", "val/bees", "val/cats"):
        draw(tmp_path / path / "1.png", (1, 2, 3), 0)
    source = Folder(str(tmp_path))
    assert source.classes == ("ants", "bees", "cats")
    assert [sample.label for sample in source.splits["val"]] == [1, 2], "a class that val lacks shifts no label"


@pytest.mark.parametrize("alias", ["val", "valid", "validation", "Val"])
def test_val_has_its_usual_names(alias: str, tmp_path: Path) -> None:
    for path in ("train/a", "train/b", f"{alias}/a"):
        draw(tmp_path / path / "1.png", (1, 2, 3), 0)
    assert len(Folder(str(tmp_path)).splits["val"]) == 1


def test_no_batch_of_one_image_is_trained_on(photos: Path) -> None:
    data = ImageDataModule(root=str(photos), batch_size=23, num_workers=0)
    data.preprocessing = PREPROCESSING
    assert [len(batch[1]) for batch in data.train_dataloader()] == [23]
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 12


def test_a_folder_without_splits_is_split(photos: Path) -> None:
    data = ImageDataModule(root=str(photos / "train"), val_fraction=0.25, num_workers=0)
    counts = {name: len(samples) for name, samples in data.splits.items()}
    assert counts["train"] + counts["val"] == 24 and counts["val"] in range(2, 12) and counts["test"] == 0


def test_digits_are_the_whole_set() -> None:
    digits = Digits()
    assert len(digits.splits["train"]) == 1797
    image = digits.read(digits.splits["train"][0])
    assert image.mode == "RGB" and image.size == (10, 10)
    assert image.getextrema()[0][1] > 200, "strokes are bright"
    assert image.getpixel((0, 5)) == (0, 0, 0), "the margin is background"


def test_root_and_source_together_are_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="keep one"):
        ImageDataModule(root=str(photos), source=Digits())


def test_without_preprocessing_it_says_where_that_comes_from(photos: Path) -> None:
    with pytest.raises(ConfigError, match="backbone"):
        ImageDataModule(root=str(photos)).train_dataloader()


@pytest.mark.parametrize("augment", ["flip", "standard"])
def test_augmentation_is_random_and_of_the_right_shape(augment: str) -> None:
    image = to_pil_image(torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8))
    transform = training(PREPROCESSING, augment)  # type: ignore[arg-type]
    seen = {transform(image).numpy().tobytes() for _ in range(20)}
    assert len(seen) >= 2
    assert transform(image).shape == (3, 32, 32)
    assert evaluation(PREPROCESSING)(image).numpy().tobytes() in seen or augment == "standard"


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ConfigError, match="none, flip, standard, trivial, rand"):
        training(PREPROCESSING, "wild")  # type: ignore[arg-type]
