"""Other labels for the same images."""

from pathlib import Path

import pytest

from project.data.sources.folder import Folder
from project.data.sources.relabeled import Relabeled
from project.errors import DataError
from project.features.views import image_views


def test_classes_become_groups_and_the_others_are_left_out(photos: Path) -> None:
    source = Folder(str(photos))
    found = Relabeled(source, {"warm": ["red"], "cold": ["green"]})
    assert found.classes == ("warm", "cold")
    assert {(Path(s.name).parent.name, s.label) for s in found.splits["train"]} == {("red", 0), ("green", 1)}
    assert [len(found.splits[split]) for split in ("train", "val", "test")] == [16, 8, 8]
    assert source.classes == ("blue", "green", "red") and len(source.splits["train"]) == 24
    assert found.name != source.name


def test_stored_rows_of_the_images_are_found_again(photos: Path) -> None:
    source = Folder(str(photos))
    found = Relabeled(source, {"red": ["red"], "other": ["green", "blue"]})
    keys = []
    for each in (source, found):
        samples = sorted(each.splits["val"], key=lambda sample: sample.name)
        keys.append([view.key for view in image_views(each, samples, [b"0"] * len(samples), None, [""])[0]])  # type: ignore[arg-type]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "groups, said",
    [
        ({"warm": ["read"], "cold": ["blue"]}, "no class 'read'. Did you mean 'red'"),
        ({"warm": ["red"], "cold": ["red", "blue"]}, "more than one group: 'red'"),
    ],
)
def test_a_wrong_group_is_refused(groups: dict[str, list[str]], said: str, photos: Path) -> None:
    with pytest.raises(DataError, match=said):
        Relabeled(Folder(str(photos)), groups).prepare()


def test_one_group_alone_is_nothing_to_train_on(photos: Path) -> None:
    with pytest.raises(DataError, match="one label only"):
        Relabeled(Folder(str(photos)), {"all": ["red", "green", "blue"]}).require()
