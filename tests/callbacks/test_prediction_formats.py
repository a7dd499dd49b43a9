"""Each format keeps all values of a table that is written in parts."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from project.callbacks import feature_file
from project.callbacks.prediction_columns import Column, Value
from project.callbacks.prediction_formats import FORMATS
from project.errors import ConfigError

COLUMNS = [Column("path"), Column("p", "number"), Column("known", "flag"), Column("set", "list"), Column("error")]
ROWS: list[list[Value]] = [
    ["a.png", 0.25, True, ["x", "y"], None],
    ['two\nlines, "quoted"\r.png', 1.0, False, [], None],
    [os.fsdecode(b"caf\xe9.png"), None, None, None, "is empty: it has 0 bytes."],
    ["ü.png", 1e-6, True, ["ü"], None],
]


def read_csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_parquet(path: Path) -> list[Any]:
    from pyarrow import parquet

    rows: list[Any] = parquet.read_table(path).to_pylist()
    return rows


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def merged(suffix: str, folder: Path) -> Path:
    """A file that is merged from two parts."""
    parts = [folder / f"part{number}{suffix}" for number in range(2)]
    for path, rows in zip(parts, (ROWS[:1], ROWS[1:]), strict=True):
        FORMATS[suffix].write(path, COLUMNS, rows)
    FORMATS[suffix].merge(parts, folder / f"all{suffix}", COLUMNS)
    return folder / f"all{suffix}"


def test_every_format_is_read_here() -> None:
    assert READERS.keys() == FORMATS.keys()


def test_csv(tmp_path: Path) -> None:
    rows = read_csv(merged(".csv", tmp_path))
    assert [row["path"] for row in rows] == ["a.png", ROWS[1][0], "caf\\udce9.png", "ü.png"]
    assert rows[0] == {"path": "a.png", "p": "0.250000", "known": "yes", "set": "x|y", "error": ""}
    assert [*rows[2].values()][1:] == ["", "", "", "is empty: it has 0 bytes."]


def test_json_lines_keep_names_that_are_not_utf8(tmp_path: Path) -> None:
    names = [column.name for column in COLUMNS]
    assert read_jsonl(merged(".jsonl", tmp_path)) == [dict(zip(names, row, strict=True)) for row in ROWS]


def test_parquet(tmp_path: Path) -> None:
    names = [column.name for column in COLUMNS]
    expected = [dict(zip(names, row, strict=True)) for row in ROWS]
    expected[2]["path"] = "caf\\udce9.png"
    assert read_parquet(merged(".parquet", tmp_path)) == expected


def test_a_part_without_values_has_the_types_of_the_others(tmp_path: Path) -> None:
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    FORMATS[".parquet"].write(paths[0], COLUMNS, ROWS[2:3])
    FORMATS[".parquet"].write(paths[1], COLUMNS, ROWS[:1])
    FORMATS[".parquet"].merge(paths, tmp_path / "all.parquet", COLUMNS)
    assert [row["p"] for row in read_parquet(tmp_path / "all.parquet")] == [None, 0.25]


def test_json_lines_have_no_nan(tmp_path: Path) -> None:
    FORMATS[".jsonl"].write(tmp_path / "p.jsonl", COLUMNS, [["a.png", float("nan"), None, None, None]])
    assert "NaN" not in (tmp_path / "p.jsonl").read_text()
    assert read_jsonl(tmp_path / "p.jsonl")[0]["p"] is None


def test_parquet_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'frozen-backbone\[parquet\]'"):
        FORMATS[".parquet"].require()


def test_feature_file_is_read_by_safetensors(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    parts = [tmp_path / "0", tmp_path / "1"]
    feature_file.write_part(parts[0], features[:2])
    feature_file.write_part(parts[1], features[2:])
    feature_file.merge_parts(parts, tmp_path / "f.safetensors", 5, 3, {"rows": "in the order of p.csv"})
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert file.metadata() == {"rows": "in the order of p.csv"}
        np.testing.assert_array_equal(file.get_tensor("features"), features)
    with pytest.raises(OSError, match="24 bytes of features were written, not 60"):
        feature_file.merge_parts(parts[:1], tmp_path / "g.safetensors", 5, 3, {})
