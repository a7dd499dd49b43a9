"""``check``: one run names everything that is wrong."""

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
from tests.data.corpus import UNREADABLE, UNUSUAL, encoded, picture


def folder(root: Path, counts: dict[str, int], first: int = 100) -> int:
    """Write pictures, each unlike all others; the next number is given back."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            (root / place / f"{number}.jpg").write_bytes(encoded(picture(number), quality=95))
        first += count
    return first


@pytest.fixture
def clean(here: Path) -> Path:
    folder(here / "photos", {f"{split}/{name}": 3 for split in ("train", "val") for name in ("cat", "dog")})
    return here / "photos"


def check(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", "report.json", *flags])
    return code, json.loads(Path("report.json").read_text())


def kinds(report: dict[str, Any], *levels: str) -> dict[str, list[str]]:
    return {f["kind"]: f["names"] for f in report["findings"] if f["level"] in levels or not levels}


def test_clean_data_exits_0_and_needs_neither_weights_nor_a_model(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = check("--data.root", "photos", "--model.weights", "nowhere.pth")
    assert code == 0 and report["clean"] and report["images"] == 12
    assert report["classes"] == {name: {"train": 3, "val": 3} for name in ("cat", "dog")}
    assert set(kinds(report)) == {"tiny class"}, "a note"
    assert "12 images (6 train, 6 val) of 2 classes" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir() if path.name not in ("photos", "report.json")] == []


def test_every_bad_image_is_named_in_one_run(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (_, write) in {**UNREADABLE, **UNUSUAL}.items():
        write(clean / "train" / "cat" / name)
    code, report = check("--data.root", "photos")
    assert code == 1
    named = {Path(name).name: kind for kind, names in kinds(report, "problem").items() for name in names}
    assert named == {name: kind for name, (kind, _) in UNREADABLE.items()}
    notes = kinds(report, "note")
    for name, (trait, _) in UNUSUAL.items():
        assert [name] == [Path(path).name for path in notes[trait] if Path(path).name in (name,)]
    shown = "".join(capsys.readouterr().out.split())
    assert all(kind.replace(" ", "") in shown for kind, _ in {**UNREADABLE, **UNUSUAL}.values())
    assert {Path(name).name for name in report["bad"]} == set(UNREADABLE)


def test_copies_in_two_splits_or_under_two_labels_are_problems(clean: Path) -> None:
    shutil.copy(clean / "train/cat/100.jpg", clean / "val/cat/same.jpg")
    shutil.copy(clean / "train/cat/101.jpg", clean / "train/dog/other.jpg")
    shutil.copy(clean / "train/cat/102.jpg", clean / "train/cat/again.jpg")
    (clean / "val/dog/alike.jpg").write_bytes(encoded(picture(103).resize((160, 120)), quality=40))
    code, report = check("--data.root", "photos", "--fix", "fixed.csv")
    assert code == 1
    found = {kind: {Path(name).name for name in names} for kind, names in kinds(report).items() if ":" in kind}
    assert found == {
        "the same: two splits": {"100.jpg", "same.jpg"},
        "the same: two labels": {"101.jpg", "other.jpg"},
        "the same: copies": {"102.jpg", "again.jpg"},
        "alike to the eye: two splits": {"103.jpg", "alike.jpg"},
    }
    bad = {Path(name).name for name in report["bad"]}
    assert bad == {"100.jpg", "101.jpg", "other.jpg", "again.jpg", "103.jpg"}, "what is measured with is kept"
    before = {path: path.read_bytes() for path in clean.rglob("*.jpg")}
    code, report = check("--data.root", "fixed.csv")
    assert code == 0 and report["images"] == 16 - 5
    assert before == {path: path.read_bytes() for path in clean.rglob("*.jpg")}, "no image is touched"


def test_folders_are_examined(clean: Path) -> None:
    folder(clean, {"train/Dog": 1, "val/Dog": 1, "train/big": 40}, 200)
    (clean / "train/empty").mkdir()
    (clean / "train/cat/.hidden.jpg").write_bytes(b"")
    (clean / "train/cat/.ipynb_checkpoints").mkdir()
    (clean / "train/cat/notes.txt").write_text("")
    (clean / "train/cat/loop").symlink_to(clean / "train")
    folder(clean, {"val/bird": 1}, 300)
    code, report = check("--data.root", "photos")
    assert code == 1
    refused, problems, notes = (kinds(report, level) for level in ("refused", "problem", "note"))
    assert refused.keys() == {"empty class", "class in one split", "same name"}
    assert problems.keys() == {"symlink loop", "class in one split"}
    assert {"hidden files", "other files", "imbalance", "tiny class"} <= notes.keys()
    assert {Path(name).name for name in notes["hidden files"]} == {".hidden.jpg", ".ipynb_checkpoints"}
    assert report["images"] == 12 + 43, "the loop does not list images twice, or those of other classes"


def test_sizes_that_differ_much_are_noted(clean: Path) -> None:
    picture(7, 700, 700).save(clean / "train/cat/large.jpg")
    assert "image sizes" in kinds(check("--data.root", "photos")[1])


def test_a_second_run_reads_only_what_is_new(
    clean: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (clean / "train/cat/bad.jpg").write_bytes(b"no")
    read: list[str] = []
    from project.data.sources import files

    real = files.read_bytes
    monkeypatch.setattr(files, "read_bytes", lambda path: (read.append(Path(path).name), real(path))[1])
    first = check("--data.root", "photos")
    assert len(set(read)) == 13
    read.clear()
    assert check("--data.root", "photos") == first and not read
    (clean / "train/cat/bad.jpg").write_bytes(encoded(picture(1)))
    shutil.move(clean / "train/dog/103.jpg", clean / "train/dog/moved.jpg")
    os.utime(clean / "train/cat/100.jpg", ns=(time.time_ns(), time.time_ns()))
    assert check("--data.root", "photos")[0] == 0
    assert set(read) == {"bad.jpg", "moved.jpg", "100.jpg"}
    for damage in (b"", b"no database" * 1000):
        (cache / "frozen-backbone" / FILE).write_bytes(damage)
        assert check("--data.root", "photos")[0] == 0


def test_a_cache_folder_that_cannot_be_made_is_done_without(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "file/cache")
    assert check("--data.root", "photos")[0] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.root", "nowhere"], "there is no folder nowhere"),
        ([], "data.root"),
        (["--data.root", "photos", "--json", "no/such/a.json"], "--json: no/such/a.json cannot be written"),
        (["--data.root", "photos", "--fix", "no/such/a.csv"], "--fix: no/such/a.csv cannot be written"),
        (["--data.root", "photos", "--fix", "a.txt"], "has to end in .csv"),
        (["--data.source", "project.data.sources.Digits", "--fix", "a.csv"], "are not files"),
        (["--data.root", "photos", "--suspects", "--model.weights", "no.pth"], "no.pth"),
    ],
)
def test_what_cannot_be_done_exits_2(
    flags: list[str], said: str, clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_suspects_are_named_with_what_they_look_like(here: Path, photos: Path, weights: Path) -> None:
    shutil.copytree(photos / "train", here / "mixed")
    shutil.move(here / "mixed/red/3.png", here / "mixed/blue/wrong.png")
    flags = ["--model.backbone", "resnet18", "--model.weights", str(weights), "--model.image_size", "32"]
    code, report = check("--data.root", "mixed", "--suspects", "--top", "3", *flags, "--model.trainable", "layer4")
    assert code == 0, "suspects are no problems"
    first = report["suspects"][0]
    assert first["name"].endswith("blue/wrong.png")
    assert (first["label"], first["looks_like"]) == ("blue", "red") and first["score"] < 0
    assert "/red/" in first["neighbour"]


def test_a_manifest_is_checked_row_by_row(clean: Path) -> None:
    with Path("table.tsv").open("w") as file:
        rows = [("path", "label", "split", "group"), ("photos/train/cat/100.jpg", "cat", "train", "a")]
        rows += [("photos/train/dog/103.jpg", "dog", "train", "a"), ("photos/train/dog/103.jpg", "cat", "train", "a")]
        rows += [("gone.jpg", "dog", "holdout", ""), ("also gone.jpg", "dog", "", ""), ("", "cat", "", "")]
        csv.writer(file, delimiter="\t").writerows(rows)
    code, report = check("--data.root", "table.tsv")
    assert code == 1 and report["images"] == 3
    refused = " ".join(finding["text"] for finding in report["findings"] if finding["level"] == "refused")
    assert all(row in refused for row in ("row 4", "row 5", "row 7")) and "holdout" in refused
    assert "also gone.jpg" in str(kinds(report)["unreadable"])


def test_a_copy_of_a_copy_is_seen(clean: Path) -> None:
    """The same bytes in another split, and something alike in the first: both leak."""
    shutil.copy(clean / "train/cat/100.jpg", clean / "val/cat/same.jpg")
    (clean / "train/dog/alike.jpg").write_bytes(encoded(picture(100).resize((160, 120)), quality=40))
    code, report = check("--data.root", "photos", "--fix", "fixed.csv")
    found = {kind: {Path(name).name for name in names} for kind, names in kinds(report, "problem").items()}
    three = {"100.jpg", "same.jpg", "alike.jpg"}
    assert code == 1 and found == {
        "the same: two splits": {"100.jpg", "same.jpg"},
        "alike to the eye: two labels": three,
        "alike to the eye: two splits": three,
    }
    assert {Path(name).name for name in report["bad"]} == three
    assert check("--data.root", "fixed.csv")[0] == 0


def test_one_picture_in_two_tints_is_compared_with_all_of_its_hash(clean: Path) -> None:
    grey = picture(200).convert("L")
    grey.save(clean / "train/cat/grey.png")
    red = Image.merge("RGB", [grey.point(lambda value, shift=shift: value + shift) for shift in (50, -25, 0)])
    red.save(clean / "train/dog/red.png")
    red.save(clean / "val/dog/red.bmp")
    found = kinds(check("--data.root", "photos")[1], "problem")
    assert {Path(name).name for name in found["alike to the eye: two splits"]} == {"red.png", "red.bmp"}


def test_names_that_are_no_text_are_told(clean: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = os.fsencode(clean / "train/cat") + b"/caf\xe9.jpg"
    Path(os.fsdecode(name)).write_bytes(b"no image")
    code, report = check("--data.root", "photos")
    assert code == 1 and [os.fsencode(path) for path in kinds(report)["not an image"]] == [
        b"photos/train/cat/caf\xe9.jpg"
    ]
    Path(os.fsdecode(name)).write_bytes(encoded(picture(5)))
    assert main(["check", "--data.root", "photos", "--fix", "a.csv"]) == 2
    assert "no UTF-8 name" in capfd.readouterr().err and not Path("a.csv").exists()


def test_what_is_beside_the_classes_is_noted_and_dangling_links_are_problems(clean: Path) -> None:
    (clean / "evaluation").mkdir()
    (clean / "loose.jpg").write_bytes(encoded(picture(5)))
    (clean / "train/bird").symlink_to("/nowhere/bird")
    (clean / "train/cat/more").symlink_to("/nowhere/more")
    code, report = check("--data.root", "photos")
    assert code == 1
    assert {Path(name).name for name in kinds(report, "note")["left out"]} == {"evaluation", "loose.jpg"}
    assert {Path(name).name for names in kinds(report, "problem").values() for name in names} == {"bird", "more"}


def test_a_group_in_two_splits_is_a_problem(clean: Path) -> None:
    rows = [f"{path},{path.parent.name},{path.parent.parent.name},{path.stem[-1]}" for path in clean.rglob("*.jpg")]
    Path("a.csv").write_text("\n".join(["path,label,split,group", *rows[:-1], rows[-1].rpartition(",")[0] + ",x"]))
    Path("a.csv").write_text(Path("a.csv").read_text().replace(f",{rows[0][-1]}\n", ",same\n"))
    report = check("--data.root", "a.csv")[1]
    shared = {row.split(",")[3] for row in rows if ",train," in row} & {
        row.split(",")[3] for row in rows if ",val," in row
    }
    assert ("group in two splits" in kinds(report, "problem")) == bool(shared)


def test_a_manifest_keeps_names_as_they_are(here: Path) -> None:
    folder(here / "photos", dict.fromkeys(("b", "b ", " c"), 3))
    assert check("--data.root", "photos", "--fix", "a.csv")[0] == 1, "names that differ by a space"
    assert check("--data.root", "a.csv")[1]["classes"].keys() == {"b", "b ", " c"}


def test_a_manifest_is_written_into_a_linked_folder(clean: Path) -> None:
    Path("deep/er").mkdir(parents=True)
    Path("link").symlink_to("deep/er")
    assert check("--data.root", "photos", "--fix", "link/a.csv")[0] == 0
    assert check("--data.root", "link/a.csv")[0] == 0
    assert main(["check", "--data.root", "link/a.csv", "--fix", "deep/er/a.csv"]) == 2


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("path,label\na,b.jpg,cat\n", "row 2 has 3 fields"),
        ("path,label,Label\na.jpg,cat,dog\n", "two columns label"),
        ("path\na.jpg\n", "no column label"),
        ("", "no column path and no label"),
    ],
)
def test_a_table_that_is_not_one_is_refused(
    table: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.csv").write_text(table)
    assert main(["check", "--data.root", "a.csv"]) == 2
    assert said in capsys.readouterr().err


def test_a_null_byte_in_a_path_is_one_bad_image(clean: Path) -> None:
    Path("a.csv").write_bytes(b"path,label\nphotos/train/cat/100.jpg,cat\na\0b.jpg,dog\n")
    code, report = check("--data.root", "a.csv")
    assert code == 1 and len(kinds(report, "problem")["unreadable"]) == 1


def test_an_overwritten_file_is_read_again_though_its_time_is_put_back(clean: Path) -> None:
    path = clean / "train/cat/100.jpg"
    assert check("--data.root", "photos")[0] == 0
    before = path.stat()
    path.write_bytes(b"0" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check("--data.root", "photos")[0] == 1


def test_a_busy_cache_is_done_without(
    clean: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("busy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert check("--data.root", "photos")[0] == 0
    database = sqlite3.connect(cache / "frozen-backbone" / FILE)
    try:
        database.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        assert check("--data.root", "photos")[0] == 0
        assert time.monotonic() - began < 30
    finally:
        database.close()


def test_suspects_of_data_that_is_refused_leave_the_report(
    clean: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["check", "--data.root", "photos", "--suspects", "--model.backbone", "resnet18"]
    flags += ["--model.weights", str(weights)]
    assert main([*flags, "--top", "-3"]) == 2
    assert "--top has to be at least 1" in capsys.readouterr().err
    folder(clean, {"val/bird": 1}, 300)
    assert main([*flags, "--json", "report.json"]) == 2
    assert json.loads(Path("report.json").read_text())["images"] == 13
