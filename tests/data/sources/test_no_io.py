"""Constructors and names of sources and of the data module do no I/O."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import CIFAR10, ImageFolder

from project.data.datamodule import ImageDataModule
from project.data.sources import Digits, Folder, HuggingFace, Manifest, Shards, Source, Torchvision
from project.data.sources.relabeled import Relabeled
from project.errors import DataError

Fit = Callable[..., int]

READ_EVENTS = ("open", "os.listdir", "os.scandir", "glob.glob", "socket.connect")
_reads: list[tuple[str, Any]] | None = None


@functools.cache
def _install_audit_hook() -> None:
    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if _reads is not None and event in READ_EVENTS:
            _reads.append((event, arguments[0]))

    sys.addaudithook(record)  # cannot be removed; _reads = None disables it


@pytest.fixture
def reads() -> Iterator[list[tuple[str, Any]]]:
    """Files opened, folders listed and connections made during the test."""
    global _reads
    _install_audit_hook()
    _reads = []
    yield _reads
    _reads = None


def sources(folder: Path) -> dict[str, Callable[[], Source]]:
    return {
        "folder": lambda: Folder(str(folder)),
        "table": lambda: Manifest(str(folder / "table.csv")),
        "digits": Digits,
        "torchvision": lambda: Torchvision(functools.partial(ImageFolder, root=str(folder))),
        "download": lambda: Torchvision(functools.partial(CIFAR10, root=str(folder), download=True)),
        "hub": lambda: HuggingFace(str(folder)),
        "shards": lambda: Shards(f"{folder}/train-{{0000..9999}}.tar", val=f"{folder}/val-*.tar"),
        "relabeled": lambda: Relabeled(Folder(str(folder)), {"a": ["x"], "b": ["y"]}),
    }


NAMES = {
    **{"folder": "data", "table": "table", "digits": "digits", "torchvision": "imagefolder", "download": "cifar10"},
    **{"hub": "data", "shards": "data", "relabeled": "data-a-b"},
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("exists", [False, True])
def test_source_constructors_and_names_do_no_io(
    kind: str, exists: bool, tmp_path: Path, reads: list[tuple[str, Any]]
) -> None:
    folder = tmp_path / "data"
    if exists:
        for name in ("x", "y"):
            (folder / name).mkdir(parents=True)
            (folder / name / "1.png").write_bytes(b"")
        (folder / "table.csv").write_text("path,label\n")
    assert sources(folder)[kind]().name == NAMES[kind]  # do the imports first
    reads.clear()
    source = sources(folder)[kind]()
    data = ImageDataModule(source=source)
    assert data.name == source.name == NAMES[kind]
    assert not reads


@pytest.mark.parametrize("root", ["data", "data/table.csv"])
def test_data_module_constructor_and_name_do_no_io(root: str, here: Path, reads: list[tuple[str, Any]]) -> None:
    ImageDataModule(root=root)
    reads.clear()
    assert ImageDataModule(root=root).name == Path(root).stem
    assert not reads


@pytest.mark.parametrize("kind", sorted(NAMES.keys() - {"digits"}))
def test_missing_data_is_refused_on_prepare(kind: str, tmp_path: Path) -> None:
    source = sources(tmp_path / "data")[kind]()
    for _ in range(2):  # a failed prepare does not leave an empty data set
        with pytest.raises(DataError):
            _ = source.classes
    with pytest.raises(DataError):
        source.require()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folder sources that are prepared during the test."""
    names: list[str] = []
    prepare = Folder._prepare

    def record(self: Folder) -> None:
        names.append(self.name)
        prepare(self)

    monkeypatch.setattr(Folder, "_prepare", record)
    return names


def test_source_is_prepared_once(photos: Path, prepared: list[str]) -> None:
    data = ImageDataModule(root=str(photos), num_workers=0)
    assert not prepared
    data.prepare_data()
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert data.classes and data.splits and data.class_counts
    assert prepared == ["photos"]


def test_shard_folder_with_a_wildcard_is_expanded(tmp_path: Path) -> None:
    (tmp_path / "set-1").mkdir()
    (tmp_path / "set-1" / "a.tar").write_bytes(b"")
    assert Shards(f"{tmp_path}/set-*/a.tar").name == "set-1"
    with pytest.raises(DataError, match="no file matches"):
        _ = Shards(f"{tmp_path}/other-*/a.tar").name


def test_source_may_set_its_attributes_in_the_constructor() -> None:
    class InMemory(Folder):
        def __init__(self) -> None:
            self.name, self.classes, self.splits = "own", ("a", "b"), {"train": []}

        def _prepare(self) -> None:
            """All attributes are set."""

    source = InMemory()
    source.require()
    assert (source.name, source.classes, source.splits, source.findings) == ("own", ("a", "b"), {"train": []}, ())


def test_resolving_a_run_does_not_prepare_the_data(fit: Fit, prepared: list[str]) -> None:
    assert fit() == 0
    prepared.clear()
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert Path("runs/photos/version_1").is_dir()
    assert prepared == ["photos"], "only the fit itself prepares the data"
