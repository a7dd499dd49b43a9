"""Names of classes, files and formats: Unicode forms, invisible characters, encodings and HEIC."""

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
DECOMPOSED = unicodedata.normalize("NFD", CAFE)  # "e" and a combining accent
HIDDEN = "cat\N{ZERO WIDTH SPACE}"
RED, BLUE = (200, 40, 40), (40, 40, 200)


@pytest.mark.parametrize(
    ("names", "level"),
    [
        ((CAFE, DECOMPOSED), "refused"),
        (("cat", HIDDEN), "refused"),
        (("cat", "Cat"), "refused"),
        (("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"), "refused"),
        (("big cat", "big_cat"), "problem"),
        (("cat", "dog"), None),
        (("cat", "cat\u3164"), "refused"),
        (("cat", "cat\ufe0f"), "refused"),
    ],
)
def test_confusable_class_names_are_refused(names: tuple[str, str], level: str | None) -> None:
    assert [finding.level for finding in name_findings(names)] == ([level] if level else [])


def test_finding_escapes_invisible_characters() -> None:
    (finding,) = name_findings(["cat", HIDDEN])
    assert "'cat' and 'cat\\u200b'" in finding.text


def test_folder_matches_class_names_that_are_equal_after_nfc(tmp_path: Path) -> None:
    for split, name in (("train", CAFE), ("val", DECOMPOSED)):
        draw(tmp_path / split / name / "0.png", RED, 0)
        draw(tmp_path / split / "tea" / "0.png", BLUE, 1)
    source = Folder(str(tmp_path))
    source.require()
    assert source.classes == (CAFE, "tea")
    assert {sample.label for sample in source.splits["val"]} == {0, 1}


def test_manifest_matches_class_names_that_are_equal_after_nfc(tmp_path: Path) -> None:
    rows = [("path", "label", "split"), ("0.png", CAFE, "train"), ("1.png", DECOMPOSED, "val")]
    rows += [("2.png", "tea", "train"), ("3.png", "tea", "val")]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(map(",".join, rows)), "utf-8")
    source = Manifest(str(table))
    source.require()
    assert source.classes == (CAFE, "tea")
    assert [sample.label for sample in source.splits["val"]] == [0, 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_manifest_with_nfc_and_nfd_names_in_one_split_is_refused(split: str, tmp_path: Path) -> None:
    rows = [("path", "label", "split"), ("0.png", CAFE, "train"), ("1.png", DECOMPOSED, split), ("2.png", CAFE, split)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(map(",".join, rows)), "utf-8")
    assert "same name" in {finding.kind for finding in Manifest(str(table)).findings}


def test_folder_with_nfc_and_nfd_names_in_one_split_is_refused(tmp_path: Path) -> None:
    for name in (CAFE, DECOMPOSED):
        draw(tmp_path / name / "0.png", RED, 0)
    with pytest.raises(DataError, match="differ only by case, invisible characters or Unicode form"):
        Folder(str(tmp_path)).require()


def test_predictions_escape_file_names_that_are_not_utf8(
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


def test_embedding_projector_escapes_file_names_that_are_not_utf8(fit: Callable[..., int], album: Path) -> None:
    (album / "val/red/0.png").rename(album / "val/red" / os.fsdecode(b"caf\xe9.png"))
    assert fit("--data.root", "album", "--dashboard.figures", "true") == 0
    (table,) = Path("runs").rglob("metadata.tsv")
    assert "caf\\udce9.png" in table.read_text("utf-8")


def test_folder_of_heic_files_names_the_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_io, "SUFFIXES", image_io.SUFFIXES - {*image_io.HEIC})
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "IMG_0001.HEIC").write_bytes(b"...")
    with pytest.raises(DataError, match="To read the 2 HEIC files there: pip install pillow-heif"):
        Folder(str(tmp_path)).require()
    assert folder_module.HEIC is image_io.HEIC


def test_heic_files_are_read_with_pillow_heif(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    image = image_io.read_image(draw(tmp_path / "a.png", RED, 0))
    heif.from_pillow(image).save(tmp_path / "a.heic")
    assert image_io.read_image(tmp_path / "a.heic").size == image.size


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_manifest_is_read_in_each_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    for name in (CAFE, "tea"):
        draw(tmp_path / f"{name}.png", RED, 0)
    (tmp_path / "table.csv").write_text(f"path,label\n{CAFE}.png,{CAFE}\ntea.png,tea\n", encoding=encoding)
    source = Manifest(str(tmp_path / "table.csv"))
    source.require()
    assert source.classes == (CAFE, "tea")


def test_manifest_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"path,label\n{CAFE}.png,{CAFE}\n", encoding="cp1252")
    with pytest.raises(DataError, match=r"is not UTF-8 text .* Save it as UTF-8"):
        Manifest(str(tmp_path / "table.csv")).require()


def test_class_names_of_published_data_sets_may_differ_by_case() -> None:
    assert [finding.level for finding in name_findings("aA", published=True)] == ["problem"]
