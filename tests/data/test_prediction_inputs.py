"""The images to predict are found in files, folders, patterns, tables, tar files and standard input."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from project.data.prediction_inputs import FileList, find_images, fingerprint, images_of_source, read_names
from project.data.sources.folder import Folder
from project.errors import ConfigError, DataError
from tests.conftest import draw

STRANGE = [os.fsdecode(b"caf\xe9.png"), "two\nlines.png", " spaces, and commas.png", "ü.png"]


def names(*inputs: str) -> list[str]:
    return [sample.name for sample in find_images(inputs).samples]


@pytest.fixture
def folder(here: Path) -> Path:
    """``new/{a,b}.png`` and ``new/deep/c.png`` in the working directory."""
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        draw(here / "new" / name, (200, 0, 0), number)
    (here / "new/notes.txt").write_text("no image")
    return here / "new"


ALL = ["new/a.png", "new/b.png", "new/deep/c.png"]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["new"], ALL),
        (["new/b.png", "new/a.png"], ["new/b.png", "new/a.png"]),
        (["new/notes.txt"], ["new/notes.txt"]),  # an explicit file may have any name
        (["new/*"], ALL),
        (["new/**/*.png"], ALL),
        (["new/?.png"], ALL[:2]),
    ],
)
def test_files_folders_and_patterns(inputs: list[str], expected: list[str], folder: Path) -> None:
    assert names(*inputs) == expected


def test_repeated_images_are_predicted_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names("new/deep/c.png", "new", "new/*.png") == ["new/deep/c.png", "new/a.png", "new/b.png"]
    assert "Images: 3 names are repeated" in capsys.readouterr().out


def test_a_file_whose_name_looks_like_a_pattern_is_itself(folder: Path) -> None:
    draw(folder / "[1].png", (0, 0, 0), 0)
    assert names("new/[1].png") == ["new/[1].png"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_needs_no_labels_and_its_paths_are_relative_to_it(suffix: str, folder: Path) -> None:
    paths = ["deep/c.png", "a.png"]
    if suffix == ".csv":
        (folder / "list.csv").write_text("number,path\n1,deep/c.png\n2,a.png\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"path": paths}), folder / "list.parquet")
    assert names(f"new/list{suffix}") == [f"new/{path}" for path in paths]


def test_a_table_without_paths_is_refused(folder: Path) -> None:
    (folder / "list.csv").write_text("file\na.png\n")
    with pytest.raises(DataError, match=r"--images: new/list\.csv has no column named path, only 'file'"):
        names("new/list.csv")


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_names_on_standard_input(separator: bytes, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = STRANGE if separator == b"\0" else [name for name in STRANGE if "\n" not in name]
    content = separator.join(map(os.fsencode, [*given, "", given[0]]))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert names("-") == given


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)  # as Python sets it
    with pytest.raises(DataError, match="--images: standard input is closed"):
        names("-")


def test_long_input_is_read_in_blocks() -> None:
    expected = [f"{number:040}.png" for number in range(60_000)]
    assert [*read_names(io.BytesIO("\n".join(expected).encode()))] == expected
    assert [*read_names(io.BytesIO(("\0".join(expected) + "\0").encode()))] == expected
    assert [*read_names(io.BytesIO(b""))] == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["nothing"], "--images: nothing does not exist. Check the name; names are relative to /"),
        (["new/*.jpg"], r"no image matches new/\*\.jpg"),
        (["empty"], "--images: empty contains no images"),
        ([""], "--images: a name is empty"),
        (["new/a.png " * 1000], r"--images: (new/a\.png ){8}… cannot be read: File name too long"),
        (["new/a.png/b.png"], r"--images: new/a\.png/b\.png does not exist"),
    ],
)
def test_inputs_without_images_are_refused(inputs: list[str], message: str, folder: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match=message):
        names(*inputs)


def test_a_tar_file_needs_no_labels(folder: Path) -> None:
    with tarfile.open("images.tar", "w") as tar:
        for path in (folder / "b.png", folder / "a.png"):
            tar.add(path, path.name)
    source, samples = find_images(["images.tar"])
    assert [sample.name.rpartition("/")[2].partition("#")[0] for sample in samples] == ["b.png", "a.png"]
    assert source.content(samples[0]) == (folder / "b.png").read_bytes()
    with pytest.raises(ConfigError, match="tar files cannot be mixed with others, such as new"):
        names("images.tar", "new")
    Path("damaged.tar").write_bytes(Path("images.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"damaged\.tar is damaged or truncated"):
        names("damaged.tar")


def test_all_images_of_a_labeled_source(photos: Path) -> None:
    source, samples = images_of_source(Folder(str(photos)))
    expected = [str(path) for split in ("train", "val", "test") for path in sorted((photos / split).glob("*/*"))]
    assert [sample.name for sample in samples] == expected
    assert source.content(samples[0]) == Path(expected[0]).read_bytes()


def test_file_list_is_a_sequence_of_any_names() -> None:
    files = FileList(STRANGE)
    assert [sample.name for sample in files] == STRANGE and len(files) == 4
    assert files[-1].name == STRANGE[-1] and [sample.name for sample in files[1:3]] == STRANGE[1:3]
    with pytest.raises(IndexError):
        _ = files[4]
    assert [sample.name for sample in pickle.loads(pickle.dumps(files))] == STRANGE


def test_fingerprint_depends_on_names_and_their_order() -> None:
    lists = [["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"], []]
    assert len({fingerprint(FileList(files)) for files in lists}) == len(lists)
    assert fingerprint(FileList(lists[0])) == fingerprint([*FileList(lists[0])])
