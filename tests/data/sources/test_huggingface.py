"""Tables of Hugging Face as a source."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from project.cli.main import main
from project.data.sources.huggingface import HuggingFace
from project.errors import DataError
from tests.conftest import draw


def prepared(*arguments: Any, **options: Any) -> HuggingFace:
    """A source whose tables are open."""
    source = HuggingFace(*arguments, **options)
    source.prepare()
    return source


def table(folder: Path, count: int, kept_as: Any = datasets.Image(), **columns: Any) -> datasets.Dataset:  # noqa: B008
    files = [str(draw(folder / f"{number}.png", (9, 9, 200), number)) for number in range(count)]
    found = datasets.Dataset.from_dict({"picture": files, "number": list(range(count)), **columns})
    return found.cast_column("picture", kept_as)


def kinds(found: datasets.Dataset) -> datasets.Dataset:
    return found.cast_column("kind", datasets.ClassLabel(names=["bee", "ant"]))


def test_tables_with_splits_and_bytes(tmp_path: Path) -> None:
    parts = {
        "train": kinds(table(tmp_path / "a", 4, kind=[0, 1, 0, 1])),
        "validation": kinds(table(tmp_path / "b", 2, kind=[1, 0])),
        "test": kinds(table(tmp_path / "c", 2, kind=[-1, -1])),
        "extra": kinds(table(tmp_path / "d", 1, kind=[1])),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "insects"))
    source = prepared(str(tmp_path / "insects"))
    source.require()
    assert (source.name, source.classes) == ("insects", ("bee", "ant"))
    assert {split: [sample.label for sample in samples] for split, samples in source.splits.items()} == {
        "train": [0, 1, 0, 1],
        "val": [1, 0],
    }
    assert source.splits["train"][2].name == "insects/train/00002"
    assert sorted(finding.kind for finding in source.findings) == ["no label", "other splits"]
    for number, sample in enumerate(source.splits["train"]):
        assert source.content(sample) == (tmp_path / "a" / f"{number}.png").read_bytes()
        assert source.read(sample).tobytes() == Image.open(tmp_path / "a" / f"{number}.png").tobytes()


def test_a_folder_called_as_a_builder_is_a_folder(here: Path) -> None:
    """``datasets`` would take the builder, and all files here for it."""
    for number, name in enumerate(("ant", "bee")):
        draw(here / "csv" / "train" / name / f"{number}.png", (90 * number, 9, 9), number)
    (here / "stray.csv").write_text("a,b\n1,2\n")
    source = prepared("csv")
    assert source.classes == ("ant", "bee") and len(source.splits["train"]) == 2


def test_a_table_with_words_for_labels_and_paths_for_images(tmp_path: Path) -> None:
    words = table(tmp_path / "a", 4, datasets.Value("string"), kind=["wasp", "ant", "", "wasp"])
    words.save_to_disk(str(tmp_path / "words"))
    source = prepared(str(tmp_path / "words"), image="picture", label="kind")
    assert source.classes == ("ant", "wasp")
    assert [sample.label for sample in source.splits["train"]] == [1, 0, 1]
    last = source.splits["train"][-1]
    assert source.content(last) == (tmp_path / "a" / "3.png").read_bytes(), "rows without a label shift none"


def test_columns_of_any_name_will_do(tmp_path: Path) -> None:
    found = kinds(table(tmp_path / "a", 2, kind=[0, 1])).rename_columns({"number": "n", "picture": "image"})
    found.rename_column("kind", "label").save_to_disk(str(tmp_path / "set"))
    source = prepared(str(tmp_path / "set"))
    assert source.content(source.splits["train"][1]) == (tmp_path / "a" / "1.png").read_bytes()


def test_a_split_alone_is_train_whatever_its_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": kinds(table(tmp_path / "a", 2, kind=[0, 1]))}).save_to_disk(str(tmp_path / "one"))
    assert list(prepared(str(tmp_path / "one")).splits) == ["train"]


def test_a_hidden_image_is_told_of_when_it_is_read(tmp_path: Path) -> None:
    found = datasets.Dataset.from_dict(
        {"picture": [None, None], "kind": [0, 1]},
        features=datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}),
    )
    found.save_to_disk(str(tmp_path / "blank"))
    source = prepared(str(tmp_path / "blank"))
    with pytest.raises(DataError, match="blank/train/00000 has no image"):
        source.read(source.splits["train"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "knd"}, "no column 'knd'. Did you mean 'kind'"),
        ({"image": "pic"}, "no column 'pic'"),
        ({"label": "weight"}, "words or whole numbers"),
        ({"image": "number", "label": "kind"}, "'number' and 'kind' cannot be taken for images and labels"),
        ({}, "no column could be the label"),
    ],
)
def test_wrong_columns_are_named(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    table(tmp_path / "a", 2, kind=["x", "y"], weight=[0.5, 1.5]).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=message):
        prepared(str(tmp_path / "set"), **arguments)


@pytest.mark.parametrize(
    ("names", "message"), [(("train", "training"), "both the train split"), (("a", "test"), "no split to train on")]
)
def test_splits_that_cannot_be_told_are_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    found = kinds(table(tmp_path / "a", 2, kind=[0, 1]))
    datasets.DatasetDict(dict.fromkeys(names, found)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=message):
        prepared(str(tmp_path / "set"))


def test_splits_with_other_numbers_for_their_classes_are_refused(tmp_path: Path) -> None:
    train = kinds(table(tmp_path / "a", 2, kind=[0, 1]))
    other = train.cast_column("kind", datasets.ClassLabel(names=["bee", "ant", "wasp"]))
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match="numbers the classes in 'kind' otherwise"):
        prepared(str(tmp_path / "set"))


def test_the_hub_is_asked_for_no_code_and_its_failures_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        raise ConnectionError("Couldn't reach 'org/beans' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"org/beans cannot be loaded: Couldn't reach.*check the network"):
        prepared("org/beans", "small", revision="v1")
    assert asked == [(("org/beans", "small"), {"revision": "v1", "trust_remote_code": False})]


def test_what_the_hub_gives_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = datasets.DatasetDict({"train": kinds(table(tmp_path / "a", 2, kind=[0, 1]))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    source = prepared("org/beans")
    assert (source.name, source.splits["train"][1].name) == ("beans", "beans/train/00001")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'frozen-backbone\[hub\]'"):
        prepared("org/beans")


def test_a_fit_on_a_table_of_hugging_face(here: Path, weights: Path) -> None:
    kinds(table(here / "a", 12, kind=[0, 1] * 6)).save_to_disk("insects")
    flags = ["--data.source", "project.data.published.HuggingFace", "--data.source.path", "insects"]
    small = ["--model.backbone", "resnet18", "--model.weights", str(weights), "--model.image_size", "32"]
    assert main(["fit", *flags, *small, "--trainer.max_epochs", "1", "--data.num_workers", "0"]) == 0
    assert (here / "runs" / "insects" / "version_0" / "checkpoints" / "best.ckpt").exists()
