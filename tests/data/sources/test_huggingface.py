"""HuggingFace: columns, splits, labels, and errors."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from project.cli.main import main
from project.data.sources.huggingface import HuggingFace
from project.errors import DataError
from tests.conftest import BACKBONE, draw


def prepared(*arguments: Any, **options: Any) -> HuggingFace:
    """A prepared source."""
    source = HuggingFace(*arguments, **options)
    source.prepare()
    return source


def table(
    folder: Path,
    count: int,
    image_type: Any = datasets.Image(),  # noqa: B008
    **columns: Any,
) -> datasets.Dataset:
    """A data set with the columns ``picture``, ``number`` and the given ones."""
    files = [str(draw(folder / f"{number}.png", (9, 9, 200), number)) for number in range(count)]
    dataset = datasets.Dataset.from_dict({"picture": files, "number": list(range(count)), **columns})
    return dataset.cast_column("picture", image_type)


def with_class_labels(dataset: datasets.Dataset) -> datasets.Dataset:
    """Cast the column ``kind`` to ``ClassLabel``."""
    return dataset.cast_column("kind", datasets.ClassLabel(names=["bee", "ant"]))


def test_splits_labels_and_bytes_are_those_of_the_data_set(tmp_path: Path) -> None:
    splits = {
        "train": with_class_labels(table(tmp_path / "a", 4, kind=[0, 1, 0, 1])),
        "validation": with_class_labels(table(tmp_path / "b", 2, kind=[1, 0])),
        "test": with_class_labels(table(tmp_path / "c", 2, kind=[-1, -1])),
        "extra": with_class_labels(table(tmp_path / "d", 1, kind=[1])),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "insects"))
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


def test_folder_named_like_a_builder_is_read_as_a_folder(here: Path) -> None:
    """``load_dataset("csv")`` would read all CSV files of the working directory."""
    for number, name in enumerate(("ant", "bee")):
        draw(here / "csv" / "train" / name / f"{number}.png", (90 * number, 9, 9), number)
    (here / "stray.csv").write_text("a,b\n1,2\n")
    source = prepared("csv")
    assert source.classes == ("ant", "bee") and len(source.splits["train"]) == 2


def test_string_labels_and_image_paths_are_read(tmp_path: Path) -> None:
    dataset = table(tmp_path / "a", 4, datasets.Value("string"), kind=["wasp", "ant", "", "wasp"])
    dataset.save_to_disk(str(tmp_path / "words"))
    source = prepared(str(tmp_path / "words"), image="picture", label="kind")
    assert source.classes == ("ant", "wasp")
    assert [sample.label for sample in source.splits["train"]] == [1, 0, 1]
    last = source.splits["train"][-1]
    assert source.content(last) == (tmp_path / "a" / "3.png").read_bytes(), "a skipped row must not shift the others"


def test_columns_are_selected_by_type(tmp_path: Path) -> None:
    dataset = with_class_labels(table(tmp_path / "a", 2, kind=[0, 1]))
    dataset = dataset.rename_columns({"number": "n", "picture": "image"})
    dataset.rename_column("kind", "label").save_to_disk(str(tmp_path / "set"))
    source = prepared(str(tmp_path / "set"))
    assert source.content(source.splits["train"][1]) == (tmp_path / "a" / "1.png").read_bytes()


def test_integer_column_named_label_is_accepted_without_class_labels(tmp_path: Path) -> None:
    dataset = table(tmp_path / "a", 4, label=[10, 9, 2, 10])
    assert dataset.features["label"] == datasets.Value("int64")
    dataset.save_to_disk(str(tmp_path / "digits"))
    source = prepared(str(tmp_path / "digits"))
    source.require()
    assert source.classes == ("2", "9", "10"), "in numeric order"
    assert [sample.label for sample in source.splits["train"]] == [2, 1, 0, 2]


def test_class_label_column_takes_precedence_over_the_column_named_label(tmp_path: Path) -> None:
    dataset = with_class_labels(table(tmp_path / "a", 2, kind=[0, 1], label=[7, 8]))
    dataset.save_to_disk(str(tmp_path / "insects"))
    assert prepared(str(tmp_path / "insects")).classes == ("bee", "ant")


def test_single_split_is_train_whatever_its_name(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": with_class_labels(table(tmp_path / "a", 2, kind=[0, 1]))}).save_to_disk(
        str(tmp_path / "one")
    )
    assert list(prepared(str(tmp_path / "one")).splits) == ["train"]


def test_missing_image_is_reported_when_it_is_read(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict(
        {"picture": [None, None], "kind": [0, 1]},
        features=datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}),
    )
    dataset.save_to_disk(str(tmp_path / "blank"))
    source = prepared(str(tmp_path / "blank"))
    with pytest.raises(DataError, match="blank/train/00000 has no image"):
        source.read(source.splits["train"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "knd"}, "no column 'knd'. Did you mean 'kind'"),
        ({"image": "pic"}, "no column 'pic'"),
        ({"label": "weight"}, "labels must be strings or integers"),
        ({"image": "number", "label": "kind"}, "'number' and 'kind' of train of .* are not images and labels"),
        ({}, "no column could be the label"),
    ],
)
def test_unusable_columns_are_reported(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    table(tmp_path / "a", 2, kind=["x", "y"], weight=[0.5, 1.5]).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=message):
        prepared(str(tmp_path / "set"), **arguments)


@pytest.mark.parametrize(
    ("names", "message"), [(("train", "training"), "both the train split"), (("a", "test"), "but no train")]
)
def test_ambiguous_or_missing_train_split_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    dataset = with_class_labels(table(tmp_path / "a", 2, kind=[0, 1]))
    datasets.DatasetDict(dict.fromkeys(names, dataset)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=message):
        prepared(str(tmp_path / "set"))


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    train = with_class_labels(table(tmp_path / "a", 2, kind=[0, 1]))
    other = train.cast_column("kind", datasets.ClassLabel(names=["bee", "ant", "wasp"]))
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"column 'kind' .* has other classes in test than in train"):
        prepared(str(tmp_path / "set"))


def test_hub_is_loaded_without_remote_code_and_failures_are_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        raise ConnectionError("Couldn't reach 'org/beans' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"org/beans cannot be loaded: Couldn't reach.*check the network"):
        prepared("org/beans", "small", revision="v1")
    assert calls == [(("org/beans", "small"), {"revision": "v1", "trust_remote_code": False})]


def test_hub_samples_are_named_after_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = datasets.DatasetDict({"train": with_class_labels(table(tmp_path / "a", 2, kind=[0, 1]))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    source = prepared("org/beans")
    assert (source.name, source.splits["train"][1].name) == ("beans", "beans/train/00001")


def test_missing_package_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'frozen-backbone\[hub\]'"):
        prepared("org/beans")


def test_fit_on_a_hugging_face_data_set(here: Path, weights: Path) -> None:
    with_class_labels(table(here / "a", 12, kind=[0, 1] * 6)).save_to_disk("insects")
    flags = ["--data.source", "project.data.published.HuggingFace", "--data.source.path", "insects"]
    small = ["--model.backbone", BACKBONE, "--model.weights", str(weights), "--model.image_size", "32"]
    assert main(["fit", *flags, *small, "--trainer.max_epochs", "1", "--data.num_workers", "0"]) == 0
    assert (here / "runs" / "insects" / "version_0" / "checkpoints" / "best.ckpt").exists()
