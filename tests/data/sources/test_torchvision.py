"""Torchvision: images, labels, splits and errors of published data sets."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision import datasets as vision
from torchvision.datasets import CIFAR10, EuroSAT, FakeData, Flowers102, Food101, ImageFolder, OxfordIIITPet

from project.cli.main import main
from project.data.datamodule import ImageDataModule
from project.data.sources.digits import Digits
from project.data.sources.torchvision import Torchvision
from project.errors import DataError
from tests.conftest import BACKBONE, draw
from tests.data.sources import published_sets

Refused = Callable[[int], str]
SETS = {
    "cifar10": (CIFAR10, {"train": {"train": True}, "test": {"train": False}}),
    "pets": (OxfordIIITPet, {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "flowers": (Flowers102, {split: {"split": split} for split in ("train", "val", "test")}),
    "eurosat": (EuroSAT, {"train": {}}),
    "food101": (Food101, {"train": {"split": "train"}, "test": {"split": "test"}}),
}


def prepared(*arguments: Any, **options: Any) -> Torchvision:
    """A prepared source."""
    source = Torchvision(*arguments, **options)
    source.prepare()
    return source


def create(name: str, root: Path, patch: pytest.MonkeyPatch) -> Path:
    """Create the small imitation of a published data set, and return its root."""
    getattr(published_sets, name)(root, patch)
    return root


class SyntheticDataset(vision.VisionDataset):
    """A data set with generated images and torchvision's usual arguments."""

    splits = ("train", "validation", "test")

    def __init__(
        self, root: str = "", split: str = "train", label: Any = None, mode: str = "RGB", **kwargs: Any
    ) -> None:
        super().__init__(root, **kwargs)
        if split not in self.splits:
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {self.splits}.")
        self.split, self.label, self.mode = split, label, mode
        self.classes = ["odd", "even"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[Image.Image, Any]:
        pixels = np.full((5, 6), number * 40 + len(self.split), np.uint8)
        return Image.fromarray(pixels).convert(self.mode), number % 2 if self.label is None else self.label


@pytest.mark.parametrize("name", SETS)
def test_source_has_the_images_and_labels_of_the_data_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, splits = SETS[name]
    root = create(name, tmp_path, monkeypatch)
    source = prepared(functools.partial(kind, root=str(root)))
    source.require()
    assert source.splits.keys() == splits.keys()
    assert source.name == kind.__name__.lower()
    names = [sample.name for samples in source.splits.values() for sample in samples]
    assert len(set(names)) == len(names)
    for split, arguments in splits.items():
        dataset = kind(str(root), **arguments)
        assert len(source.splits[split]) == len(dataset)
        names = getattr(dataset, "classes", [])
        for sample, (image, label) in zip(source.splits[split], dataset, strict=True):
            assert source.classes[sample.label] == (names[label] if names else str(label))
            assert source.read(sample).tobytes() == image.convert("RGB").tobytes()
            assert (source.stamp(sample) is None) == (name == "cifar10")


def test_content_is_the_bytes_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = prepared(functools.partial(EuroSAT, root=create("eurosat", tmp_path, monkeypatch)))
    sample = source.splits["train"][0]
    assert source.content(sample) == Path(sample.name).read_bytes()


def test_stored_labels_are_used_without_reading_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = create("pets", tmp_path, monkeypatch), []
    getitem = OxfordIIITPet.__getitem__
    monkeypatch.setattr(OxfordIIITPet, "__getitem__", lambda self, at: read.append(at) or getitem(self, at))
    prepared(functools.partial(OxfordIIITPet, root=str(root)))
    assert len(read) == 4, "only the first and the last item of each split"


def test_damaged_image_does_not_prevent_opening_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create("pets", tmp_path, monkeypatch)
    (root / "oxford-iiit-pet" / "images" / "Abyssinian_0.jpg").write_bytes(b"no image")
    source = prepared(functools.partial(OxfordIIITPet, root=str(root)))
    assert len(source.splits["train"]) == 30
    with pytest.raises(DataError, match=r"Abyssinian_0\.jpg is not a readable image"):
        source.read(source.splits["train"][0])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        Image.open(draw(tmp_path / name / "1.png", (1, 2, 3), 0)).save(tmp_path / name / "1.jpg", exif=exif)
        (tmp_path / name / "1.png").unlink()
    source = prepared(ImageFolder(str(tmp_path)))
    assert source.read(source.splits["train"][0]).size == (40, 48)


def test_stored_labels_and_paths_that_contradict_the_items_are_ignored(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name / "1.png", (1, 2, 3), 0)
    grey = ImageFolder(str(tmp_path), loader=lambda path: Image.open(path).convert("L"))
    grey.targets = [1, 1]
    source = prepared(grey)
    assert [sample.label for sample in source.splits["train"]] == [0, 1]
    image = source.read(source.splits["train"][0])
    assert image.getchannel("R").tobytes() == image.getchannel("G").tobytes()


def test_images_are_read_from_several_threads() -> None:
    source = prepared(functools.partial(FakeData, size=40, image_size=(3, 16, 16), num_classes=4))
    samples, dataset = source.splits["train"], FakeData(40, (3, 16, 16), 4)
    assert [int(source.classes[sample.label]) for sample in samples] == [label for _, label in dataset]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(source.read, samples))
    assert [image.tobytes() for image in images] == [image.tobytes() for image, _ in dataset]
    assert samples[12].name == "fakedata/train/00012"


def test_data_set_instance_is_all_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create("cifar10", tmp_path, monkeypatch)
    data = ImageDataModule(source=CIFAR10(str(root)))
    assert {split: len(samples) for split, samples in data.source.splits.items()} == {"train": 50}


@pytest.mark.parametrize("source", [Digits, functools.partial(Digits, margin=2), Digits()])
def test_source_may_be_an_instance_a_class_or_a_partial(source: Any) -> None:
    assert ImageDataModule(source=source).name == "digits"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["train", "val", "test"]), ({"split": "train"}, ["train", "val", "test"]), ({"split": "test"}, ["train"])],
)
def test_all_splits_are_opened_unless_one_is_selected(given: dict[str, str], expected: list[str]) -> None:
    assert list(prepared(functools.partial(SyntheticDataset, **given)).splits) == expected


@pytest.mark.parametrize("split", ["test", "val"])
def test_selected_split_is_train(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = create("flowers", tmp_path, monkeypatch)
    source = prepared(functools.partial(Flowers102, root=str(root), split=split))
    first = {"val": 103, "test": 205}[split]
    assert list(source.splits) == ["train"] and source.splits["train"][0].name.endswith(f"image_{first:05d}.jpg")
    cifar = prepared(functools.partial(CIFAR10, str(create("cifar10", tmp_path, monkeypatch)), train=False))
    assert {name: len(samples) for name, samples in cifar.splits.items()} == {"train": 10}


def test_default_split_with_an_unusual_name_is_train() -> None:
    class Standard(SyntheticDataset):
        splits = ("standard", "val")

        def __init__(self, split: str = "standard", **kwargs: Any) -> None:
            super().__init__(split=split, **kwargs)

    assert list(prepared(Standard).splits) == ["train", "val"]


def test_arguments_passed_on_to_base_classes_are_recognized() -> None:
    class Derived(SyntheticDataset):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    assert list(prepared(Derived).splits) == ["train", "val", "test"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_images_of_every_mode_are_preserved(mode: str) -> None:
    source, dataset = prepared(functools.partial(SyntheticDataset, mode=mode)), SyntheticDataset(mode=mode)
    for sample, (image, _) in zip(source.splits["train"], dataset, strict=False):
        assert source.read(sample).tobytes() == image.convert("RGB").tobytes()


def test_tilde_in_root_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    create("food101", tmp_path / "data", monkeypatch)
    assert prepared(functools.partial(Food101, root="~/data")).classes == ("apple_pie", "sushi")


def test_unlabeled_images_are_skipped_and_equal_class_names_numbered() -> None:
    dataset = SyntheticDataset()
    dataset.targets, dataset.classes = [None, 1, 0, -1], [("crane",), ("crane",)]
    dataset.__class__ = type(
        "Cranes", (SyntheticDataset,), {"__getitem__": lambda self, at: (SyntheticDataset()[at][0], self.targets[at])}
    )
    source = prepared(dataset)
    assert source.classes == ("crane (0)", "crane (1)")
    assert [sample.label for sample in source.splits["train"]] == [1, 0]
    assert [finding.text for finding in source.findings] == ["2 images of train have no label and are skipped."]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (functools.partial(CIFAR10, root="nowhere"), "CIFAR10 cannot be opened.*Add download: true"),
        (functools.partial(ImageFolder, root="nowhere"), "ImageFolder cannot be opened.*nowhere"),
        (functools.partial(SyntheticDataset, label=0.5), "not for classification.*0.5"),
        (functools.partial(SyntheticDataset, label={"boxes": [1]}), "not for classification.*boxes"),
        (functools.partial(SyntheticDataset, transform=torch.nn.Identity()), "transforms.*data.augment"),
        (functools.partial(SyntheticDataset, colour="red"), "SyntheticDataset cannot be opened.*colour"),
        (functools.partial(SyntheticDataset, split="other"), "Unknown value 'other'"),
        (lambda: [1, 2], "is not a torchvision data set"),
    ],
)
def test_data_set_not_for_classification_is_refused(dataset: Any, message: str, here: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepared(dataset)
    assert len(str(caught.value).splitlines()) == 1


def test_single_class_is_refused() -> None:
    with pytest.raises(DataError, match="only one class, 'odd'"):
        prepared(functools.partial(SyntheticDataset, label=0)).require()


@pytest.mark.parametrize("kinds", ["segmentation", "binary-category", ["category", "segmentation"]])
def test_target_types_other_than_category_are_refused(
    kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = create("pets", tmp_path, monkeypatch)
    with pytest.raises(DataError, match="must be category"):
        prepared(functools.partial(OxfordIIITPet, root=str(root), target_types=kinds))


def test_unreachable_server_is_reported(here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    flags = ["--data.source.root", "sets", "--data.source.download", "true"]
    for name in ("CIFAR10", "OxfordIIITPet", "EuroSAT", "MNIST"):
        message = refused(main(["fit", "--data.source", f"torchvision.datasets.{name}", *flags]))
        assert f"{name} cannot be downloaded" in message and "Connection refused" in message
        assert "Check the network" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["torchvision.datasets.CIFAR10", "--data.source.root", "x"], "Add download: true"),
        (["torchvision.datasets.CIFAR10"], "CIFAR10 needs root"),
        (["torchvision.datasets.CIFAR1"], "there is no class torchvision.datasets.CIFAR1"),
        (["torchvision.datasets.CIFAR10", "--data.source.rot", "x"], "Did you mean 'root'?"),
        (["torch.nn.Linear"], "torch.nn.Linear is not a Source"),
        (["project.data.sources.Folder", "--data.source.root", "x"], "there is no folder x"),
        (["project.data.published.HuggingFace", "--data.source.path", "x/y"], "x/y cannot be loaded"),
        (["project.data.published.HuggingFace", "--data.source.path", "pandas"], "there is no folder pandas"),
    ],
)
def test_command_line_errors_are_reported(
    flags: list[str], message: str, here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert message in refused(main(["fit", "--data.source", *flags]))


@pytest.mark.parametrize("name", ["pets", "flowers", "eurosat"])
def test_shipped_config_fits_its_data_set(
    name: str, here: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
    settings = yaml.safe_load(config.read_text())
    monkeypatch.setenv("HOME", str(here))
    create(name, here / "data", monkeypatch)
    small = ["--model.backbone", BACKBONE, "--model.weights", str(weights), "--model.image_size", "32"]
    cheap = ["--trainer.max_epochs", "1", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", str(config), *small, *cheap]) == 0
    kind = settings["data"]["source"]["class_path"].rpartition(".")[2].lower()
    run = here / "runs" / kind / "version_0"
    assert (run / "checkpoints" / "best.ckpt").exists()
    source = yaml.safe_load((run / "config.yaml").read_text())["data"]["source"]
    assert source["init_args"]["root"] == "~/data" and source["init_args"]["download"] is True
    if name == "pets":  # the saved config runs again
        ckpt = str(run / "checkpoints" / "best.ckpt")
        assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", ckpt]) == 0


def test_fit_from_flags_without_a_config(here: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create("cifar10", here / "sets", monkeypatch)
    flags = ["--data.source", "torchvision.datasets.CIFAR10", "--data.source.root", "sets", "--data.num_workers", "2"]
    small = ["--model.backbone", BACKBONE, "--model.weights", str(weights), "--model.image_size", "32"]
    assert main(["fit", *flags, *small, "--trainer.max_epochs", "1", "--features.cache", "off"]) == 0
    assert (here / "runs" / "cifar10" / "version_0" / "checkpoints" / "best.ckpt").exists()


def test_missing_package_is_reported() -> None:
    def needs_h5py() -> vision.VisionDataset:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    with pytest.raises(DataError, match=r"needs a package that is not installed.*pip install h5py"):
        prepared(needs_h5py)
