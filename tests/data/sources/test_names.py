"""Names that are not what they look like: of classes, of files, and of the formats that need a library."""

import csv
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from project.data import image_io
from project.data.sources import folder as folder_module
from project.data.sources.findings import name_findings
from project.data.sources.folder import Folder
from project.data.sources.manifest import Manifest
from project.errors import DataError
from tests.conftest import draw

CAFE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
APART = unicodedata.normalize("NFD", CAFE)  # an e, and an accent of its own
HIDDEN = "cat\N{ZERO WIDTH SPACE}"
RED, BLUE = (200, 40, 40), (40, 40, 200)


@pytest.mark.parametrize(
    ("names", "level"),
    [
        ((CAFE, APART), "refused"),
        (("cat", HIDDEN), "refused"),
        (("cat", "Cat"), "refused"),
        (("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"), "refused"),
        (("big cat", "big_cat"), "problem"),
        (("cat", "dog"), None),
        (("cat", "cat\u3164"), "refused"),
        (("cat", "cat\ufe0f"), "refused"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(names: tuple[str, str], level: str | None) -> None:
    assert [finding.level for finding in name_findings(names)] == ([level] if level else [])


def test_the_refusal_shows_what_cannot_be_seen() -> None:
    (finding,) = name_findings(["cat", HIDDEN])
    assert "'cat' and 'cat\\u200b'" in finding.text


def test_the_same_name_in_two_forms_is_one_class(tmp_path: Path) -> None:
    for split, name in (("train", CAFE), ("val", APART)):
        draw(tmp_path / split / name / "0.png", RED, 0)
        draw(tmp_path / split / "tea" / "0.png", BLUE, 1)
    source = Folder(str(tmp_path))
    source.require()
    assert source.classes == (CAFE, "tea")
    assert {sample.label for sample in source.splits["val"]} == {0, 1}


def test_both_forms_in_one_split_are_refused(tmp_path: Path) -> None:
    for name in (CAFE, APART):
        draw(tmp_path / name / "0.png", RED, 0)
    with pytest.raises(DataError, match="differ by case or by characters that cannot be seen"):
        Folder(str(tmp_path)).require()


def test_a_name_that_is_not_utf8_keeps_its_row(
    fit: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from project.cli.main import main

    assert fit() == 0
    Path("new").mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    (Path("new") / name).write_bytes(next(photos.rglob("*.png")).read_bytes())
    checkpoint = "runs/photos/version_0/checkpoints/last.ckpt"
    assert main(["predict", "--ckpt_path", checkpoint, "--data.predict", "new"]) == 0
    with Path("predictions.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == "new/caf\\udce9.png"


def test_a_fit_with_such_a_name_has_its_projector(fit: Callable[..., int], album: Path) -> None:
    (album / "val/red/0.png").rename(album / "val/red" / os.fsdecode(b"caf\xe9.png"))
    assert fit("--data.root", "album", "--dashboard.figures", "true") == 0
    (table,) = Path("runs").rglob("metadata.tsv")
    assert "caf\\udce9.png" in table.read_text("utf-8")


def test_photographs_of_an_iphone_alone_are_named_with_what_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_io, "SUFFIXES", image_io.SUFFIXES - {*image_io.HEIC})
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "IMG_0001.HEIC").write_bytes(b"...")
    with pytest.raises(DataError, match="To read the 2 HEIC files there: pip install pillow-heif"):
        Folder(str(tmp_path)).require()
    assert folder_module.HEIC is image_io.HEIC


def test_they_are_read_where_the_library_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    picture = image_io.read_image(draw(tmp_path / "a.png", RED, 0))
    heif.from_pillow(picture).save(tmp_path / "a.heic")
    assert image_io.read_image(tmp_path / "a.heic").size == picture.size


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_table_of_any_unicode_is_read(encoding: str, tmp_path: Path) -> None:
    for name in (CAFE, "tea"):
        draw(tmp_path / f"{name}.png", RED, 0)
    (tmp_path / "table.csv").write_text(f"path,label\n{CAFE}.png,{CAFE}\ntea.png,tea\n", encoding=encoding)
    source = Manifest(str(tmp_path / "table.csv"))
    source.require()
    assert source.classes == (CAFE, "tea")


def test_another_encoding_is_refused_with_the_one_to_take(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"path,label\n{CAFE}.png,{CAFE}\n", encoding="cp1252")
    with pytest.raises(DataError, match=r"is not UTF-8 text .* Save it as UTF-8"):
        Manifest(str(tmp_path / "table.csv")).require()


def test_published_names_may_differ_by_case() -> None:
    assert [finding.level for finding in name_findings("aA", published=True)] == ["problem"]
