"""The data module: batches, splits, augmentation, balancing and unreadable images."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from project.data import splits
from project.data.datamodule import ImageDataModule
from project.data.dataset import ImageBatch, ImageDataset
from project.data.image_index import ImageInfo
from project.data.mixup import BatchMixer
from project.data.near_duplicates import Clusters
from project.data.samplers import Padding
from project.data.sources.digits import Digits
from project.data.sources.findings import name_findings
from project.data.sources.folder import Folder
from project.data.splits import assign_places, stratified_folds
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


def test_labels_are_indices_into_the_train_classes_in_every_split(tmp_path: Path) -> None:
    for path in ("train/ants", "train/bees", "train/cats", "val/bees", "val/cats"):
        draw(tmp_path / path / "1.png", (1, 2, 3), 0)
    source = Folder(str(tmp_path))
    assert source.classes == ("ants", "bees", "cats")
    assert [sample.label for sample in source.splits["val"]] == [1, 2], "labels do not shift when val lacks a class"


@pytest.mark.parametrize("alias", ["val", "valid", "validation", "Val"])
def test_common_names_of_val_are_accepted(alias: str, tmp_path: Path) -> None:
    for path in ("train/a", "train/b", f"{alias}/a"):
        draw(tmp_path / path / "1.png", (1, 2, 3), 0)
    assert len(Folder(str(tmp_path)).splits["val"]) == 1


def test_training_has_no_batch_of_one_image(photos: Path) -> None:
    data = ImageDataModule(root=str(photos), batch_size=23, num_workers=0)
    data.preprocessing = PREPROCESSING
    assert [len(batch[1]) for batch in data.train_dataloader()] == [23]
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 12


def test_val_is_held_out_of_a_folder_without_splits(photos: Path) -> None:
    data = ImageDataModule(root=str(photos / "train"), val_fraction=0.25, num_workers=0)
    counts = {name: len(samples) for name, samples in data.splits.items()}
    assert counts["train"] + counts["val"] == 24 and counts["val"] in range(2, 12) and counts["test"] == 0


def test_digits_source_has_all_1797_images() -> None:
    digits = Digits()
    assert len(digits.splits["train"]) == 1797
    image = digits.read(digits.splits["train"][0])
    assert image.mode == "RGB" and image.size == (10, 10)
    assert image.getextrema()[0][1] > 200, "strokes are bright"
    assert image.getpixel((0, 5)) == (0, 0, 0), "the margin is background"


def test_root_and_source_are_mutually_exclusive(photos: Path) -> None:
    with pytest.raises(ConfigError, match="keep one"):
        ImageDataModule(root=str(photos), source=Digits())


def test_missing_preprocessing_error_mentions_the_backbone(photos: Path) -> None:
    with pytest.raises(ConfigError, match="backbone"):
        len(ImageDataModule(root=str(photos)).train_dataloader())


@pytest.mark.parametrize("augment", ["flip", "standard"])
def test_augmentation_is_random_and_keeps_the_output_shape(augment: str) -> None:
    image = to_pil_image(torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8))
    transform = training(PREPROCESSING, augment)  # type: ignore[arg-type]
    outputs = {transform(image).numpy().tobytes() for _ in range(20)}
    assert len(outputs) >= 2
    assert transform(image).shape == (3, 32, 32)
    assert evaluation(PREPROCESSING)(image).numpy().tobytes() in outputs or augment == "standard"


def test_unknown_augmentation_is_rejected() -> None:
    with pytest.raises(ConfigError, match="none, flip, standard, trivial, rand"):
        training(PREPROCESSING, "wild")  # type: ignore[arg-type]


def train_loader(data: ImageDataModule) -> Any:
    data.preprocessing = PREPROCESSING
    return data.train_dataloader()


@pytest.mark.parametrize("augment", ["standard", "trivial", "rand"])
def test_augmentation_depends_on_seed_and_epoch_but_not_on_workers(photos: Path, augment: Any) -> None:
    second_epochs = []
    for workers in (0, 1, 2):
        data = ImageDataModule(root=str(photos), batch_size=6, num_workers=workers, augment=augment)
        loader = train_loader(data).images
        epochs = []
        for epoch in (0, 1, 0):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            epochs.append((torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])))
        assert not torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][0], epochs[2][0])
        second_epochs.append(epochs[1])
        stop_workers(loader)
    expected_images, expected_labels = second_epochs[0]
    for images, labels in second_epochs:
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_custom_transforms_are_applied_before_the_evaluation_transform(photos: Path) -> None:
    custom = [v2.RandomVerticalFlip(1.0), v2.RandomRotation(0)]
    data = ImageDataModule(root=str(photos), augment=custom, num_workers=0)
    data.preprocessing = PREPROCESSING
    image = Image.open(data.splits["train"][0].name).convert("RGB")
    assert torch.equal(
        data.training_transform()(image), evaluation(PREPROCESSING)(image.transpose(Image.FLIP_TOP_BOTTOM))
    )
    other = training(PREPROCESSING, [v2.RandomVerticalFlip(0.9), v2.RandomRotation(0)])
    assert repr(other) != repr(data.training_transform()) == repr(training(PREPROCESSING, custom)), (
        "the reprs, which are part of feature keys, differ"
    )


def test_transform_that_cannot_be_pickled_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment"):
        training(PREPROCESSING, [v2.Lambda(lambda image: image)])


@pytest.fixture
def imbalanced(tmp_path: Path) -> Path:
    """Two classes, of 30 and 3 images."""
    for name, count in (("many", 30), ("few", 3)):
        for number in range(count):
            draw(tmp_path / "train" / name / f"{number}.png", (number * 8, 100, 50), 1000 * len(name) + number)
            draw(tmp_path / "val" / name / f"{number}.png", (number * 8, 50, 100), 2000 * len(name) + number)
    return tmp_path


def test_balancing_sampler_draws_each_class_equally_often(imbalanced: Path) -> None:
    data = ImageDataModule(root=str(imbalanced), balance="sampler", batch_size=10, num_workers=0)
    order = data.order("train")
    drawn = torch.cat(
        [torch.tensor([data.splits["train"][i].label for i in order(e).indices.tolist()]) for e in range(30)]
    )
    assert len(drawn) == 30 * 33 and drawn.float().mean() == pytest.approx(0.5, abs=0.06)
    assert order(0).indices.tolist() != order(1).indices.tolist()
    assert data.order("val")(0).indices.tolist() == list(range(33)), "evaluation data is not resampled"


def test_loss_weights_are_inverse_to_class_size(imbalanced: Path) -> None:
    data = ImageDataModule(root=str(imbalanced), balance="loss", num_workers=0)
    assert data.classes == ("few", "many")
    assert data.class_weights == pytest.approx([33 / 6, 33 / 60])
    assert ImageDataModule(root=str(imbalanced), num_workers=0).class_weights is None


def test_unreadable_images_are_skipped_in_all_splits_and_listed(
    imbalanced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (imbalanced / split / "many" / "bad.png").write_bytes(b"no")
    data = ImageDataModule(root=str(imbalanced), on_bad_image="skip", num_workers=0)
    assert {name: len(samples) for name, samples in data.splits.items()} == {"train": 33, "val": 33, "test": 0}
    out = capsys.readouterr().out
    assert "skipping 1 of 34 images of train that cannot be read" in out and "bad.png" in out
    stopping = train_loader(ImageDataModule(root=str(imbalanced), num_workers=0))
    with pytest.raises(DataError, match=r"bad\.png"):
        list(stopping)


def test_training_images_are_limited_once_the_others_are_held_out(
    imbalanced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (imbalanced / "train/many/bad.png").write_bytes(b"no")
    options: dict[str, Any] = {"root": str(imbalanced), "num_workers": 0, "on_bad_image": "skip"}
    data, whole = ImageDataModule(per_class=5, **options), ImageDataModule(**options)
    assert data.class_counts == {"train": [3, 5], "val": [3, 30], "test": [0, 0]}
    assert data.splits["val"] == whole.splits["val"]
    assert set(data.splits["train"]) < set(whole.splits["train"])
    out = capsys.readouterr().out
    assert "Data: 8 of 33 training images are used, at most 5 of each class (data.per_class)\n" in out
    assert "Data: fewer training images than data.per_class: few (3)\n" in out


def test_near_duplicates_are_searched_once(imbalanced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(imbalanced / "val")
    searches: list[int] = []
    search = splits.near_duplicates

    def counted(infos: Sequence[ImageInfo]) -> Clusters:
        searches.append(len(infos))
        return search(infos)

    monkeypatch.setattr(splits, "near_duplicates", counted)
    data = ImageDataModule(root=str(imbalanced), per_class=5, num_workers=0)
    train, folds = data.splits["train"], data.training_folds(5)
    assert searches == [33]
    alone = assign_places(train, data.image_infos(train), 0)
    assert folds.tolist() == stratified_folds(alone, 5)


def test_folds_partition_the_data(imbalanced: Path) -> None:
    validated = [
        {
            sample.name
            for sample in ImageDataModule(root=str(imbalanced), fold=f"{number}/3", num_workers=0).splits["val"]
        }
        for number in (1, 2, 3)
    ]
    assert sum(map(len, validated)) == len(set().union(*validated)) == 66


@pytest.mark.parametrize(
    "arguments",
    [{"mixup": -1.0}, {"mixup": 1e-300}, {"cutmix": -0.1}, {"fold": "7/5"}, {"val_fraction": 1.0}, {"per_class": 0}],
)
def test_arguments_out_of_range_are_rejected(photos: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\."):
        ImageDataModule(root=str(photos), **arguments)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_batches_have_class_probabilities_and_depend_on_the_seed_only(mixup: float, cutmix: float) -> None:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 3
    batch = ImageBatch(images, labels, torch.ones(8, dtype=torch.bool))
    mixed, targets, _ = BatchMixer(3, mixup, cutmix)(batch, 1)
    torch.rand(5)
    again, other = BatchMixer(3, mixup, cutmix)(batch, 1), BatchMixer(3, mixup, cutmix)(batch, 2)
    assert torch.equal(mixed, again[0]) and not torch.equal(mixed, other[0]), "only the seed matters"
    assert mixed.shape == images.shape and mixed.dtype == torch.float32 and mixed.min() >= 0 and mixed.max() <= 1
    assert targets.shape == (8, 3) and torch.allclose(targets.sum(1), torch.ones(8))
    assert ((targets > 0) & (targets < 1)).any(), "some images are mixed"
    padded = batch._replace(valid=torch.arange(8) < 6)
    without_padding = ImageBatch(*(part[:6] for part in batch))
    expected, result = (BatchMixer(3, mixup, cutmix)(part, 1) for part in (without_padding, padded))
    assert all(torch.equal(part[:6], whole) for part, whole in zip(result, expected, strict=True)), (
        "images are not mixed with padding"
    )
    assert not result.targets[6:].any(), "padding has no class"
    only_padding = ImageBatch(*(part[6:] for part in padded))
    assert not BatchMixer(3, mixup, cutmix)(only_padding, 1).targets.any()


def test_class_without_readable_training_images_is_rejected(imbalanced: Path) -> None:
    for number in range(3):
        (imbalanced / "train/few" / f"{number}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="'few' has no training images left"):
        _ = ImageDataModule(root=str(imbalanced), on_bad_image="skip", num_workers=0).splits


def test_only_image_of_a_class_is_in_train_in_every_fold(tmp_path: Path) -> None:
    for number in range(20):
        draw(tmp_path / "many" / f"{number}.png", (number * 8, 100, 50), number)
    draw(tmp_path / "one" / "0.png", (0, 0, 0), 99)
    for number in range(1, 4):
        splits = ImageDataModule(root=str(tmp_path), fold=f"{number}/3", num_workers=0).splits
        assert [sample.name for sample in splits["train"] if sample.label == 1] == [str(tmp_path / "one" / "0.png")]
        assert all(sample.label == 0 for sample in splits["val"]) and splits["val"]


@pytest.mark.parametrize("transform", [v2.RandomCrop(400), v2.Normalize([0.5], [0.5]), torch.nn.ReLU()])
def test_failing_custom_transform_is_reported_with_the_image_size(transform: Any) -> None:
    image = Image.new("RGB", (50, 40))
    with pytest.raises(ConfigError, match=r"data\.augment failed on an image of 50x40"):
        training(PREPROCESSING, [transform])(image)


@pytest.mark.parametrize(
    ("names", "is_similar"),
    [(("Cat", "cat "), True), (("big cat", "big_cat"), True), (("big-cat", "bigcat"), True), (("-1", "1"), False)],
)
def test_class_names_that_differ_by_case_spaces_or_hyphens_are_reported(
    names: tuple[str, str], is_similar: bool
) -> None:
    assert bool([*name_findings(names)]) == is_similar


def test_negative_index_is_the_last_image_and_padding_is_invalid(photos: Path) -> None:
    source = Folder(str(photos))
    images = ImageDataset(source.splits["val"], source, evaluation(PREPROCESSING))
    last, again, padding = images[len(images) - 1], images[-1], images[Padding(len(images) - 1)]
    assert torch.equal(last.images, again.images) and last[1:] == again[1:] == (2, True)
    assert torch.equal(padding.images, last.images) and padding[1:] == (2, False)
