"""Relabeled: grouped classes on the same images."""

from pathlib import Path

import pytest

from project.data.sources.folder import Folder
from project.data.sources.relabeled import Relabeled
from project.errors import DataError
from project.features.views import image_views


def test_classes_are_grouped_and_other_classes_skipped(photos: Path) -> None:
    source = Folder(str(photos))
    relabeled = Relabeled(source, {"warm": ["red"], "cold": ["green"]})
    assert relabeled.classes == ("warm", "cold")
    assert {(Path(s.name).parent.name, s.label) for s in relabeled.splits["train"]} == {("red", 0), ("green", 1)}
    assert [len(relabeled.splits[split]) for split in ("train", "val", "test")] == [16, 8, 8]
    assert source.classes == ("blue", "green", "red") and len(source.splits["train"]) == 24
    assert relabeled.name != source.name


def test_stored_features_are_reused(photos: Path) -> None:
    source = Folder(str(photos))
    relabeled = Relabeled(source, {"red": ["red"], "other": ["green", "blue"]})
    keys = []
    for origin in (source, relabeled):
        samples = sorted(origin.splits["val"], key=lambda sample: sample.name)
        keys.append([view.key for view in image_views(origin, samples, [b"0"] * len(samples), None, [""])[0]])  # type: ignore[arg-type]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"warm": ["read"], "cold": ["blue"]}, "no class 'read'. Did you mean 'red'"),
        ({"warm": ["red"], "cold": ["red", "blue"]}, "more than one group: 'red'"),
    ],
)
def test_invalid_group_is_refused(groups: dict[str, list[str]], message: str, photos: Path) -> None:
    with pytest.raises(DataError, match=message):
        Relabeled(Folder(str(photos)), groups).prepare()


def test_single_group_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match="only one class"):
        Relabeled(Folder(str(photos)), {"all": ["red", "green", "blue"]}).require()
