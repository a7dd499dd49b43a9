from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from project.data.datamodule import ImageDataModule
from project.data.dataset import ImageBatch, ImageDataset
from project.data.mixup import BatchMixer
from project.data.samplers import Padding
from project.data.sources.digits import Digits
from project.data.sources.findings import name_findings
from project.data.sources.folder import Folder
from project.data.transforms import evaluation, training
from project.errors import ConfigError, DataError
from project.preprocessing import Preprocessing
from tests.conftest import draw, stop_workers

PREPROCESSING = Preprocessing(36, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_batches_are_uint8_images_and_labels(photos: Path) -> None:
    data = ImageDataModule(root=str(photos), batch_size=5, num_workers=0)
    data.preprocessing = PREPROCESSING
    images, labels, valid = next(iter(data.val_dataloader()))
    assert valid.all()
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
        len(ImageDataModule(root=str(photos)).train_dataloader())


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


def loader_of(data: ImageDataModule) -> Any:
    data.preprocessing = PREPROCESSING
    return data.train_dataloader()


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand"])
def test_augmentation_is_that_of_the_seed_and_the_epoch_with_any_number_of_workers(photos: Path, augment: Any) -> None:
    seen = []
    for workers in (0, 1, 2):
        data = ImageDataModule(root=str(photos), batch_size=6, num_workers=workers, augment=augment)
        loader = loader_of(data).images
        epochs = []
        for epoch in (0, 1, 0):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            epochs.append((torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
        assert not torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][0], epochs[2][0])
        seen.append(epochs[1])
        stop_workers(loader)
    assert all(torch.equal(images, seen[0][0]) and torch.equal(labels, seen[0][1]) for images, labels in seen)


def test_transforms_of_torchvision_come_before_the_evaluation_transform(photos: Path) -> None:
    own = [v2.RandomVerticalFlip(1.0), v2.RandomRotation(0)]
    data = ImageDataModule(root=str(photos), augment=own, num_workers=0)
    data.preprocessing = PREPROCESSING
    image = Image.open(data.splits["train"][0].name).convert("RGB")
    assert torch.equal(
        data.training_transform()(image), evaluation(PREPROCESSING)(image.transpose(Image.FLIP_TOP_BOTTOM))
    )
    other = training(PREPROCESSING, [v2.RandomVerticalFlip(0.9), v2.RandomRotation(0)])
    assert repr(other) != repr(data.training_transform()) == repr(training(PREPROCESSING, own)), (
        "the store tells them apart"
    )


def test_a_transform_that_cannot_be_told_from_others_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment"):
        training(PREPROCESSING, [v2.Lambda(lambda image: image)])


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Thirty images of one class, three of another."""
    for name, count in (("many", 30), ("few", 3)):
        for number in range(count):
            draw(tmp_path / "train" / name / f"{number}.png", (number * 8, 100, 50), 1000 * len(name) + number)
            draw(tmp_path / "val" / name / f"{number}.png", (number * 8, 50, 100), 2000 * len(name) + number)
    return tmp_path


def test_a_sampler_draws_each_class_equally_often(unequal: Path) -> None:
    data = ImageDataModule(root=str(unequal), balance="sampler", batch_size=10, num_workers=0)
    order = data.order("train")
    drawn = torch.cat(
        [torch.tensor([data.splits["train"][i].label for i in order(e).indices.tolist()]) for e in range(30)]
    )
    assert len(drawn) == 30 * 33 and drawn.float().mean() == pytest.approx(0.5, abs=0.06)
    assert order(0).indices.tolist() != order(1).indices.tolist()
    assert data.order("val")(0).indices.tolist() == list(range(33)), "what is measured with is left as it is"


def test_loss_weights_make_up_for_the_sizes_of_classes(unequal: Path) -> None:
    data = ImageDataModule(root=str(unequal), balance="loss", num_workers=0)
    assert data.classes == ("few", "many")
    assert data.class_weights == pytest.approx([33 / 6, 33 / 60])
    assert ImageDataModule(root=str(unequal), num_workers=0).class_weights is None


def test_bad_images_are_skipped_in_all_splits_and_named(unequal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (unequal / split / "many" / "bad.png").write_bytes(b"no")
    data = ImageDataModule(root=str(unequal), on_bad_image="skip", num_workers=0)
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 33, "val": 33, "test": 0}
    out = capsys.readouterr().out
    assert "skips 1 of 34 images of train, which cannot be read" in out and "bad.png" in out
    stopping = loader_of(ImageDataModule(root=str(unequal), num_workers=0))
    with pytest.raises(DataError, match=r"bad\.png"):
        list(stopping)


def test_a_fold_is_one_flag(unequal: Path) -> None:
    held = [
        {sample.name for sample in ImageDataModule(root=str(unequal), fold=f"{number}/3", num_workers=0).splits["val"]}
        for number in (1, 2, 3)
    ]
    assert sum(map(len, held)) == len(set().union(*held)) == 66


@pytest.mark.parametrize(
    "arguments", [{"mixup": -1.0}, {"mixup": 1e-300}, {"cutmix": -0.1}, {"fold": "7/5"}, {"val_fraction": 1.0}]
)
def test_arguments_out_of_range_are_refused(photos: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\."):
        ImageDataModule(root=str(photos), **arguments)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_images_have_shares_of_classes(mixup: float, cutmix: float) -> None:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 3
    batch = ImageBatch(images, labels, torch.ones(8, dtype=torch.bool))
    mixed, shares, _ = BatchMixer(3, mixup, cutmix)(batch, 1)
    torch.rand(5)
    again, other = BatchMixer(3, mixup, cutmix)(batch, 1), BatchMixer(3, mixup, cutmix)(batch, 2)
    assert torch.equal(mixed, again[0]) and not torch.equal(mixed, other[0]), "it is the seed's alone"
    assert mixed.shape == images.shape and mixed.dtype == torch.float32 and mixed.min() >= 0 and mixed.max() <= 1
    assert shares.shape == (8, 3) and torch.allclose(shares.sum(1), torch.ones(8))
    assert ((shares > 0) & (shares < 1)).any(), "some are mixed"
    padded = batch._replace(valid=torch.arange(8) < 6)
    alone, parts = (
        BatchMixer(3, mixup, cutmix)(each, 1) for each in (ImageBatch(*(part[:6] for part in batch)), padded)
    )
    assert all(torch.equal(part[:6], whole) for part, whole in zip(parts, alone, strict=True)), (
        "none is mixed with padding"
    )
    assert not parts.targets[6:].any(), "which is of no class"
    nothing = ImageBatch(*(part[6:] for part in padded))
    assert not BatchMixer(3, mixup, cutmix)(nothing, 1).targets.any()


def test_a_class_that_nothing_is_left_of_is_refused(unequal: Path) -> None:
    for number in range(3):
        (unequal / "train/few" / f"{number}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="'few' is left to train on"):
        _ = ImageDataModule(root=str(unequal), on_bad_image="skip", num_workers=0).splits


def test_a_class_of_one_image_is_trained_on_in_each_fold(tmp_path: Path) -> None:
    for number in range(20):
        draw(tmp_path / "many" / f"{number}.png", (number * 8, 100, 50), number)
    draw(tmp_path / "one" / "0.png", (0, 0, 0), 99)
    for number in range(1, 4):
        splits = ImageDataModule(root=str(tmp_path), fold=f"{number}/3", num_workers=0).splits
        assert [sample.name for sample in splits["train"] if sample.label == 1] == [str(tmp_path / "one" / "0.png")]
        assert all(sample.label == 0 for sample in splits["val"]) and splits["val"]


@pytest.mark.parametrize("transform", [v2.RandomCrop(400), v2.Normalize([0.5], [0.5]), torch.nn.ReLU()])
def test_a_transform_that_fails_is_told(transform: Any) -> None:
    image = Image.new("RGB", (50, 40))
    with pytest.raises(ConfigError, match=r"data\.augment cannot transform an image of 50x40"):
        training(PREPROCESSING, [transform])(image)


@pytest.mark.parametrize(
    ("names", "alike"),
    [(("Cat", "cat "), True), (("big cat", "big_cat"), True), (("big-cat", "bigcat"), True), (("-1", "1"), False)],
)
def test_names_that_differ_by_case_or_space_are_told(names: tuple[str, str], alike: bool) -> None:
    assert bool([*name_findings(names)]) == alike


def test_item_minus_one_is_the_last_image_and_padding_is_one_that_does_not_count(photos: Path) -> None:
    source = Folder(str(photos))
    images = ImageDataset(source.splits["val"], source, evaluation(PREPROCESSING))
    last, again, padding = images[len(images) - 1], images[-1], images[Padding(len(images) - 1)]
    assert torch.equal(last.images, again.images) and last[1:] == again[1:] == (2, True)
    assert torch.equal(padding.images, last.images) and padding[1:] == (2, False)
