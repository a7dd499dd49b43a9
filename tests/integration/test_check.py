"""The ``check`` verb: findings, the JSON report, the fixed manifest, suspect labels and the image index."""

import csv
import json
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from project.cli.main import main
from project.data.image_index import FILE
from tests.conftest import BACKBONE
from tests.data.corpus import UNREADABLE, UNUSUAL, encoded, picture


def write_photos(root: Path, counts: dict[str, int], first: int = 100) -> int:
    """Write distinct pictures into folders, and return the next number."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            (root / folder / f"{number}.jpg").write_bytes(encoded(picture(number), quality=95))
        first += count
    return first


@pytest.fixture
def clean(here: Path) -> Path:
    write_photos(here / "photos", {f"{split}/{name}": 3 for split in ("train", "val") for name in ("cat", "dog")})
    return here / "photos"


def check(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", "report.json", *flags])
    return code, json.loads(Path("report.json").read_text())


def kinds(report: dict[str, Any], *levels: str) -> dict[str, list[str]]:
    return {f["kind"]: f["names"] for f in report["findings"] if f["level"] in levels or not levels}


def test_clean_data_exits_0_without_loading_weights(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check("--data.root", "photos", "--model.weights", "nowhere.pth")
    assert code == 0 and report["clean"] and report["images"] == 12
    assert report["classes"] == {name: {"train": 3, "val": 3} for name in ("cat", "dog")}
    assert set(kinds(report)) == {"tiny class"}, "a note only"
    assert "12 images (6 train, 6 val) of 2 classes" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir() if path.name not in ("photos", "report.json")] == []


def test_all_unreadable_and_unusual_images_are_reported_in_one_run(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (_, write) in {**UNREADABLE, **UNUSUAL}.items():
        write(clean / "train" / "cat" / name)
    code, report = check("--data.root", "photos")
    assert code == 1
    problems = {Path(name).name: kind for kind, names in kinds(report, "problem").items() for name in names}
    assert problems == {name: kind for name, (kind, _) in UNREADABLE.items()}
    notes = kinds(report, "note")
    for name, (trait, _) in UNUSUAL.items():
        assert name in {Path(path).name for path in notes[trait]}
    output = "".join(capsys.readouterr().out.split())
    assert all(kind.replace(" ", "") in output for kind, _ in {**UNREADABLE, **UNUSUAL}.values())
    assert {Path(name).name for name in report["bad"]} == set(UNREADABLE)


def test_duplicates_across_splits_or_labels_are_problems(clean: Path) -> None:
    shutil.copy(clean / "train/cat/100.jpg", clean / "val/cat/same.jpg")
    shutil.copy(clean / "train/cat/101.jpg", clean / "train/dog/other.jpg")
    shutil.copy(clean / "train/cat/102.jpg", clean / "train/cat/again.jpg")
    (clean / "val/dog/alike.jpg").write_bytes(encoded(picture(103).resize((160, 120)), quality=40))
    code, report = check("--data.root", "photos", "--fix", "fixed.csv")
    assert code == 1
    found = {kind: {Path(name).name for name in names} for kind, names in kinds(report).items() if ":" in kind}
    assert found == {
        "duplicate: two splits": {"100.jpg", "same.jpg"},
        "duplicate: two labels": {"101.jpg", "other.jpg"},
        "duplicate: copies": {"102.jpg", "again.jpg"},
        "near-duplicate: two splits": {"103.jpg", "alike.jpg"},
    }
    bad = {Path(name).name for name in report["bad"]}
    assert bad == {"100.jpg", "101.jpg", "other.jpg", "again.jpg", "103.jpg"}, "evaluation images are kept"
    before = {path: path.read_bytes() for path in clean.rglob("*.jpg")}
    code, report = check("--data.root", "fixed.csv")
    assert code == 0 and report["images"] == 16 - 5
    assert before == {path: path.read_bytes() for path in clean.rglob("*.jpg")}, "no image is changed"


def test_problems_of_folders_are_reported(clean: Path) -> None:
    write_photos(clean, {"train/Dog": 1, "val/Dog": 1, "train/big": 40}, 200)
    (clean / "train/empty").mkdir()
    (clean / "train/cat/.hidden.jpg").write_bytes(b"")
    (clean / "train/cat/.ipynb_checkpoints").mkdir()
    (clean / "train/cat/notes.txt").write_text("")
    (clean / "train/cat/loop").symlink_to(clean / "train")
    write_photos(clean, {"val/bird": 1}, 300)
    code, report = check("--data.root", "photos")
    assert code == 1
    refused, problems, notes = (kinds(report, level) for level in ("refused", "problem", "note"))
    assert refused.keys() == {"empty class", "class in one split", "same name"}
    assert problems.keys() == {"symlink loop", "class in one split"}
    assert {"hidden files", "other files", "imbalance", "tiny class"} <= notes.keys()
    assert {Path(name).name for name in notes["hidden files"]} == {".hidden.jpg", ".ipynb_checkpoints"}
    assert report["images"] == 12 + 43, "images behind the symlink loop are not listed"


def test_large_spread_of_image_sizes_is_noted(clean: Path) -> None:
    picture(7, 700, 700).save(clean / "train/cat/large.jpg")
    assert "image sizes" in kinds(check("--data.root", "photos")[1])


def test_second_run_reads_only_new_and_changed_images(
    clean: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (clean / "train/cat/bad.jpg").write_bytes(b"no")
    names_read: list[str] = []
    from project.data.sources import files

    read_bytes = files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path: (names_read.append(Path(path).name), read_bytes(path))[1])
    first = check("--data.root", "photos")
    assert len(set(names_read)) == 13
    names_read.clear()
    assert check("--data.root", "photos") == first and not names_read
    (clean / "train/cat/bad.jpg").write_bytes(encoded(picture(1)))
    shutil.move(clean / "train/dog/103.jpg", clean / "train/dog/moved.jpg")
    os.utime(clean / "train/cat/100.jpg", ns=(time.time_ns(), time.time_ns()))
    assert check("--data.root", "photos")[0] == 0
    assert set(names_read) == {"bad.jpg", "moved.jpg", "100.jpg"}
    for damage in (b"", b"not a database" * 1000):
        (cache / "frozen-backbone" / FILE).write_bytes(damage)
        assert check("--data.root", "photos")[0] == 0


def test_check_works_without_a_writable_cache_folder(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "file/cache")
    assert check("--data.root", "photos")[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.root", "nowhere"], "there is no folder nowhere"),
        ([], "data.root"),
        (["--data.root", "photos", "--json", "no/such/a.json"], "--json: cannot write no/such/a.json"),
        (["--data.root", "photos", "--fix", "no/such/a.csv"], "--fix: cannot write no/such/a.csv"),
        (["--data.root", "photos", "--json", "photos"], "--json: photos is a folder. Pass a file."),
        (["--data.root", "photos", "--top", "5"], "--top is the number of suspects. Add --suspects"),
        (["--data.root", "photos", "--fix", "a.txt"], "must end in .csv"),
        (["--data.source", "project.data.sources.Digits", "--fix", "a.csv"], "are not files"),
        (["--data.root", "photos", "--suspects", "--model.weights", "no.pth"], "no.pth"),
    ],
)
def test_user_errors_exit_2(flags: list[str], message: str, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_home_folder_of_reports_is_expanded(clean: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert main(["check", "--data.root", "photos", "--json=~/a.json", "--fix=~/a.csv"]) == 0
    assert json.loads((here / "a.json").read_text())["clean"] and (here / "a.csv").is_file()
    assert not Path("~").exists()


def test_suspects_are_reported_with_the_class_they_look_like(here: Path, photos: Path, weights: Path) -> None:
    shutil.copytree(photos / "train", here / "mixed")
    shutil.move(here / "mixed/red/3.png", here / "mixed/blue/wrong.png")
    flags = ["--model.backbone", BACKBONE, "--model.weights", str(weights), "--model.image_size", "32"]
    ignored = ["--model.trainable", "layer4", "--model.adapter", "lora", "--model.lora_rank", "2"]
    code, report = check("--data.root", "mixed", "--suspects", "--top", "3", *flags, *ignored)
    assert code == 0, "suspects are not problems"
    first = report["suspects"][0]
    assert first["name"].endswith("blue/wrong.png")
    assert (first["label"], first["looks_like"]) == ("blue", "red") and first["score"] < 0
    assert "/red/" in first["neighbour"]


def test_bad_rows_of_a_manifest_are_reported(clean: Path) -> None:
    with Path("table.tsv").open("w") as file:
        rows = [("path", "label", "split", "group"), ("photos/train/cat/100.jpg", "cat", "train", "a")]
        rows += [("photos/train/dog/103.jpg", "dog", "train", "a"), ("photos/train/dog/103.jpg", "cat", "train", "a")]
        rows += [("gone.jpg", "dog", "holdout", ""), ("missing too.jpg", "dog", "", ""), ("", "cat", "", "")]
        csv.writer(file, delimiter="\t").writerows(rows)
    code, report = check("--data.root", "table.tsv")
    assert code == 1 and report["images"] == 3
    refused = " ".join(finding["text"] for finding in report["findings"] if finding["level"] == "refused")
    assert all(row in refused for row in ("row 4", "row 5", "row 7")) and "holdout" in refused
    assert "missing too.jpg" in str(kinds(report)["unreadable"])


def test_near_duplicate_of_a_duplicate_is_found(clean: Path) -> None:
    """A duplicate in another split and a near-duplicate in the same split: all three are left out."""
    shutil.copy(clean / "train/cat/100.jpg", clean / "val/cat/same.jpg")
    (clean / "train/dog/alike.jpg").write_bytes(encoded(picture(100).resize((160, 120)), quality=40))
    code, report = check("--data.root", "photos", "--fix", "fixed.csv")
    found = {kind: {Path(name).name for name in names} for kind, names in kinds(report, "problem").items()}
    three = {"100.jpg", "same.jpg", "alike.jpg"}
    assert code == 1 and found == {
        "duplicate: two splits": {"100.jpg", "same.jpg"},
        "near-duplicate: two labels": three,
        "near-duplicate: two splits": three,
    }
    assert {Path(name).name for name in report["bad"]} == three
    assert check("--data.root", "fixed.csv")[0] == 0


def test_pictures_with_one_hash_and_different_colours_are_compared_separately(clean: Path) -> None:
    grey = picture(200).convert("L")
    grey.save(clean / "train/cat/grey.png")
    red = Image.merge("RGB", [grey.point(lambda value, shift=shift: value + shift) for shift in (50, -25, 0)])
    red.save(clean / "train/dog/red.png")
    red.save(clean / "val/dog/red.bmp")
    found = kinds(check("--data.root", "photos")[1], "problem")
    assert {Path(name).name for name in found["near-duplicate: two splits"]} == {"red.png", "red.bmp"}


def test_file_name_that_is_not_utf8_is_reported_but_not_written_to_a_manifest(
    clean: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = os.fsencode(clean / "train/cat") + b"/caf\xe9.jpg"
    Path(os.fsdecode(name)).write_bytes(b"no image")
    code, report = check("--data.root", "photos")
    assert code == 1 and [os.fsencode(path) for path in kinds(report)["not an image"]] == [
        b"photos/train/cat/caf\xe9.jpg"
    ]
    Path(os.fsdecode(name)).write_bytes(encoded(picture(5)))
    assert main(["check", "--data.root", "photos", "--fix", "a.csv"]) == 2
    assert "is not valid UTF-8" in capfd.readouterr().err and not Path("a.csv").exists()


def test_entries_outside_of_classes_are_noted_and_dangling_links_are_problems(clean: Path) -> None:
    (clean / "evaluation").mkdir()
    (clean / "loose.jpg").write_bytes(encoded(picture(5)))
    (clean / "train/bird").symlink_to("/nowhere/bird")
    (clean / "train/cat/more").symlink_to("/nowhere/more")
    code, report = check("--data.root", "photos")
    assert code == 1
    assert {Path(name).name for name in kinds(report, "note")["left out"]} == {"evaluation", "loose.jpg"}
    assert {Path(name).name for names in kinds(report, "problem").values() for name in names} == {"bird", "more"}


@pytest.mark.parametrize("is_shared", [True, False])
def test_group_in_two_splits_is_a_problem(is_shared: bool, clean: Path) -> None:
    rows = ["path,label,split,group"]
    for path in clean.rglob("*.jpg"):
        split, label = path.parts[-3:-1]
        rows.append(f"{path},{label},{split},{'patient' if is_shared else split}")
    Path("a.csv").write_text("\n".join(rows))
    report = check("--data.root", "a.csv")[1]
    assert ("group in two splits" in kinds(report, "problem")) == is_shared


def test_manifest_preserves_spaces_in_class_names(here: Path) -> None:
    write_photos(here / "photos", dict.fromkeys(("b", "b ", " c"), 3))
    assert check("--data.root", "photos", "--fix", "a.csv")[0] == 1, "names that differ by a space"
    assert check("--data.root", "a.csv")[1]["classes"].keys() == {"b", "b ", " c"}


def test_manifest_can_be_written_into_a_linked_folder(clean: Path) -> None:
    Path("deep/er").mkdir(parents=True)
    Path("link").symlink_to("deep/er")
    assert check("--data.root", "photos", "--fix", "link/a.csv")[0] == 0
    assert check("--data.root", "link/a.csv")[0] == 0
    assert main(["check", "--data.root", "link/a.csv", "--fix", "deep/er/a.csv"]) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,label\na,b.jpg,cat\n", "row 2 has 3 fields"),
        ("path,label,Label\na.jpg,cat,dog\n", "two columns named label"),
        ("path\na.jpg\n", "no column named label"),
        ("", "no column named path or label"),
    ],
)
def test_malformed_table_is_rejected(table: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.csv").write_text(table)
    assert main(["check", "--data.root", "a.csv"]) == 2
    assert message in capsys.readouterr().err


def test_path_with_a_null_byte_is_one_unreadable_image(clean: Path) -> None:
    Path("a.csv").write_bytes(b"path,label\nphotos/train/cat/100.jpg,cat\na\0b.jpg,dog\n")
    code, report = check("--data.root", "a.csv")
    assert code == 1 and len(kinds(report, "problem")["unreadable"]) == 1


def test_overwritten_file_is_read_again_even_if_its_mtime_is_restored(clean: Path) -> None:
    path = clean / "train/cat/100.jpg"
    assert check("--data.root", "photos")[0] == 0
    before = path.stat()
    path.write_bytes(b"0" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check("--data.root", "photos")[0] == 1


def test_check_works_while_the_index_is_locked(
    clean: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("busy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert check("--data.root", "photos")[0] == 0
    database = sqlite3.connect(cache / "frozen-backbone" / FILE)
    try:
        database.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        assert check("--data.root", "photos")[0] == 0
        assert time.monotonic() - start < 30
    finally:
        database.close()


def test_report_is_written_before_suspects_fail_on_invalid_data(
    clean: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["check", "--data.root", "photos", "--suspects", "--model.backbone", BACKBONE]
    flags += ["--model.weights", str(weights)]
    assert main([*flags, "--top", "-3"]) == 2
    assert "--top must be at least 1" in capsys.readouterr().err
    write_photos(clean, {"val/bird": 1}, 300)
    assert main([*flags, "--json", "report.json"]) == 2
    assert json.loads(Path("report.json").read_text())["images"] == 13
