"""Published data sets: what a source gives of them is what they give themselves."""

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
from tests.conftest import draw
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
    """A source whose data set is open."""
    source = Torchvision(*arguments, **options)
    source.prepare()
    return source


def made(name: str, root: Path, patch: pytest.MonkeyPatch) -> Path:
    getattr(published_sets, name)(root, patch)
    return root


class Drawn(vision.VisionDataset):
    """Images that are made when they are asked for, with arguments as torchvision's sets have them."""

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
def test_a_source_gives_what_the_data_set_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, splits = SETS[name]
    root = made(name, tmp_path, monkeypatch)
    source = prepared(functools.partial(kind, root=str(root)))
    source.require()
    assert source.splits.keys() == splits.keys()
    assert source.name == kind.__name__.lower()
    names = [sample.name for samples in source.splits.values() for sample in samples]
    assert len(set(names)) == len(names)
    for split, arguments in splits.items():
        own = kind(str(root), **arguments)
        assert len(source.splits[split]) == len(own)
        known = getattr(own, "classes", [])
        for sample, (image, label) in zip(source.splits[split], own, strict=True):
            assert source.classes[sample.label] == (known[label] if known else str(label))
            assert source.read(sample).tobytes() == image.convert("RGB").tobytes()
            assert (source.stamp(sample) is None) == (name == "cifar10")


def test_file_bytes_are_read_without_being_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = prepared(functools.partial(EuroSAT, root=made("eurosat", tmp_path, monkeypatch)))
    sample = source.splits["train"][0]
    assert source.content(sample) == Path(sample.name).read_bytes()


def test_labels_are_had_without_reading_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, read = made("pets", tmp_path, monkeypatch), []
    getitem = OxfordIIITPet.__getitem__
    monkeypatch.setattr(OxfordIIITPet, "__getitem__", lambda self, at: read.append(at) or getitem(self, at))
    prepared(functools.partial(OxfordIIITPet, root=str(root)))
    assert len(read) == 4, "the first and the last of each split"


def test_a_damaged_image_is_no_reason_to_refuse_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("pets", tmp_path, monkeypatch)
    (root / "oxford-iiit-pet" / "images" / "Abyssinian_0.jpg").write_bytes(b"no image")
    source = prepared(functools.partial(OxfordIIITPet, root=str(root)))
    assert len(source.splits["train"]) == 30
    with pytest.raises(DataError, match=r"Abyssinian_0\.jpg is not an image"):
        source.read(source.splits["train"][0])


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        Image.open(draw(tmp_path / name / "1.png", (1, 2, 3), 0)).save(tmp_path / name / "1.jpg", exif=exif)
        (tmp_path / name / "1.png").unlink()
    source = prepared(ImageFolder(str(tmp_path)))
    assert source.read(source.splits["train"][0]).size == (40, 48)


def test_labels_and_paths_that_the_items_disagree_with_are_not_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw(tmp_path / name / "1.png", (1, 2, 3), 0)
    grey = ImageFolder(str(tmp_path), loader=lambda path: Image.open(path).convert("L"))
    grey.targets = [1, 1]
    source = prepared(grey)
    assert [sample.label for sample in source.splits["train"]] == [0, 1]
    image = source.read(source.splits["train"][0])
    assert image.getchannel("R").tobytes() == image.getchannel("G").tobytes()


def test_fake_data_is_the_same_from_many_threads() -> None:
    source = prepared(functools.partial(FakeData, size=40, image_size=(3, 16, 16), num_classes=4))
    samples, own = source.splits["train"], FakeData(40, (3, 16, 16), 4)
    assert [int(source.classes[sample.label]) for sample in samples] == [label for _, label in own]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(source.read, samples))
    assert [image.tobytes() for image in images] == [image.tobytes() for image, _ in own]
    assert samples[12].name == "fakedata/train/00012"


def test_a_data_set_itself_is_all_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("cifar10", tmp_path, monkeypatch)
    data = ImageDataModule(source=CIFAR10(str(root)))
    assert {split: len(samples) for split, samples in data.source.splits.items()} == {"train": 50}


@pytest.mark.parametrize("source", [Digits, functools.partial(Digits, margin=2), Digits()])
def test_sources_of_other_kinds_may_be_bound_too(source: Any) -> None:
    assert ImageDataModule(source=source).name == "digits"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ["train", "val", "test"]), ({"split": "train"}, ["train", "val", "test"]), ({"split": "test"}, ["train"])],
)
def test_splits_that_are_taken(given: dict[str, str], expected: list[str]) -> None:
    assert list(prepared(functools.partial(Drawn, **given)).splits) == expected


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_split_of_the_users_choice_is_that_alone(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("flowers", tmp_path, monkeypatch)
    source = prepared(functools.partial(Flowers102, root=str(root), split=split))
    first = {"val": 103, "test": 205}[split]
    assert list(source.splits) == ["train"] and source.splits["train"][0].name.endswith(f"image_{first:05d}.jpg")
    cifar = prepared(functools.partial(CIFAR10, str(made("cifar10", tmp_path, monkeypatch)), train=False))
    assert {name: len(samples) for name, samples in cifar.splits.items()} == {"train": 10}


def test_a_default_of_another_name_is_train() -> None:
    class Standard(Drawn):
        splits = ("standard", "val")

        def __init__(self, split: str = "standard", **kwargs: Any) -> None:
            super().__init__(split=split, **kwargs)

    assert list(prepared(Standard).splits) == ["train", "val"]


def test_arguments_that_a_class_hands_on_are_known() -> None:
    class Handing(Drawn):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    assert list(prepared(Handing).splits) == ["train", "val", "test"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pixels_of_any_kind_come_through(mode: str) -> None:
    source, own = prepared(functools.partial(Drawn, mode=mode)), Drawn(mode=mode)
    for sample, (image, _) in zip(source.splits["train"], own, strict=False):
        assert source.read(sample).tobytes() == image.convert("RGB").tobytes()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made("food101", tmp_path / "data", monkeypatch)
    assert prepared(functools.partial(Food101, root="~/data")).classes == ("apple_pie", "sushi")


def test_images_without_labels_are_left_out_and_classes_are_told_apart() -> None:
    named = Drawn()
    named.targets, named.classes = [None, 1, 0, -1], [("crane",), ("crane",)]
    named.__class__ = type("Cranes", (Drawn,), {"__getitem__": lambda self, at: (Drawn()[at][0], self.targets[at])})
    source = prepared(named)
    assert source.classes == ("crane (0)", "crane (1)")
    assert [sample.label for sample in source.splits["train"]] == [1, 0]
    assert [finding.text for finding in source.findings] == ["2 images of train have no label, and are left out."]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (functools.partial(CIFAR10, root="nowhere"), "CIFAR10 cannot be opened.*Add download: true"),
        (functools.partial(ImageFolder, root="nowhere"), "ImageFolder cannot be opened.*nowhere"),
        (functools.partial(Drawn, label=0.5), "not for classification.*0.5"),
        (functools.partial(Drawn, label={"boxes": [1]}), "not for classification.*boxes"),
        (functools.partial(Drawn, transform=torch.nn.Identity()), "transforms.*data.augment"),
        (functools.partial(Drawn, colour="red"), "Drawn cannot be opened.*colour"),
        (functools.partial(Drawn, split="other"), "Unknown value 'other'"),
        (lambda: [1, 2], "no data set"),
    ],
)
def test_what_is_no_classification_set_is_refused(dataset: Any, message: str, here: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepared(dataset)
    assert len(str(caught.value).splitlines()) == 1


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(DataError, match="one label only, 'odd'"):
        prepared(functools.partial(Drawn, label=0)).require()


@pytest.mark.parametrize("kinds", ["segmentation", "binary-category", ["category", "segmentation"]])
def test_other_targets_of_pets_are_refused(kinds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made("pets", tmp_path, monkeypatch)
    with pytest.raises(DataError, match="only category"):
        prepared(functools.partial(OxfordIIITPet, root=str(root), target_types=kinds))


def test_a_server_that_cannot_be_reached_is_named(
    here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    flags = ["--data.source.root", "sets", "--data.source.download", "true"]
    for name in ("CIFAR10", "OxfordIIITPet", "EuroSAT", "MNIST"):
        said = refused(main(["fit", "--data.source", f"torchvision.datasets.{name}", *flags]))
        assert f"{name} cannot be downloaded" in said and "Connection refused" in said and "Check the network" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["torchvision.datasets.CIFAR10", "--data.source.root", "x"], "Add download: true"),
        (["torchvision.datasets.CIFAR10"], "CIFAR10 needs root"),
        (["torchvision.datasets.CIFAR1"], "there is no class torchvision.datasets.CIFAR1"),
        (["torchvision.datasets.CIFAR10", "--data.source.rot", "x"], "Did you mean 'root'?"),
        (["torch.nn.Linear"], "torch.nn.Linear is no Source"),
        (["project.data.sources.Folder", "--data.source.root", "x"], "there is no folder x"),
        (["project.data.published.HuggingFace", "--data.source.path", "x/y"], "x/y cannot be loaded"),
        (["project.data.published.HuggingFace", "--data.source.path", "pandas"], "pandas is no folder here"),
    ],
)
def test_mistakes_on_the_command_line_are_told(
    flags: list[str], message: str, here: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert message in refused(main(["fit", "--data.source", *flags]))


@pytest.mark.parametrize("name", ["pets", "flowers", "eurosat"])
def test_a_shipped_config_fits_a_small_copy_of_its_set(
    name: str, here: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
    settings = yaml.safe_load(config.read_text())
    monkeypatch.setenv("HOME", str(here))
    made(name, here / "data", monkeypatch)
    small = ["--model.backbone", "resnet18", "--model.weights", str(weights), "--model.image_size", "32"]
    cheap = ["--trainer.max_epochs", "1", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", str(config), *small, *cheap]) == 0
    kind = settings["data"]["source"]["class_path"].rpartition(".")[2].lower()
    run = here / "runs" / kind / "version_0"
    assert (run / "checkpoints" / "best.ckpt").exists()
    kept = yaml.safe_load((run / "config.yaml").read_text())["data"]["source"]
    assert kept["init_args"]["root"] == "~/data" and kept["init_args"]["download"] is True
    if name == "pets":  # what a run has kept runs again, on the splits of the set
        ckpt = str(run / "checkpoints" / "best.ckpt")
        assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", ckpt]) == 0


def test_flags_alone_are_enough(here: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("cifar10", here / "sets", monkeypatch)
    flags = ["--data.source", "torchvision.datasets.CIFAR10", "--data.source.root", "sets", "--data.num_workers", "2"]
    small = ["--model.backbone", "resnet18", "--model.weights", str(weights), "--model.image_size", "32"]
    assert main(["fit", *flags, *small, "--trainer.max_epochs", "1", "--features.cache", "off"]) == 0
    assert (here / "runs" / "cifar10" / "version_0" / "checkpoints" / "best.ckpt").exists()


def test_a_package_that_torchvision_lacks_is_named() -> None:
    def needs() -> vision.VisionDataset:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    with pytest.raises(DataError, match=r"needs a package.*pip install h5py"):
        prepared(needs)
