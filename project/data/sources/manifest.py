"""A table of images as a source: CSV, TSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from project.data.sources.base import SPLITS, Finding, Sample, quote_names
from project.data.sources.files import Files
from project.data.sources.findings import class_findings, name_findings, train_spelling
from project.errors import DataError

COLUMNS = ("path", "label", "split", "group")
#: Separators of the table formats by file suffix; ``None`` for Parquet.
TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".parquet": None, ".pq": None}


class Manifest(Files):
    """A table of images with the columns ``path``, ``label`` and optionally ``split`` and ``group``.

    Paths are relative to the folder of the table. A row without a split belongs to train.

    Args:
        path: Path of a CSV, TSV or Parquet file.
    """

    def __init__(self, path: str) -> None:
        self._file = Path(path).expanduser()
        self.name = self._file.stem

    def _prepare(self) -> None:
        file = self._file
        findings: list[Finding] = []
        bad: dict[str, list[str]] = defaultdict(list)
        seen: dict[str, tuple[int, str]] = {}
        entries: list[tuple[str, str, str, str]] = []
        for number, row in read_table(file):
            where, label = f"row {number}", row["label"]
            split = SPLITS.get(row["split"].strip().lower() or "train")
            name = str(file.parent / row["path"])
            if not row["path"] or not label:
                bad["has no path or no label"].append(where)
            elif split is None:
                bad[f"has a split that is not one of {', '.join(SPLITS)}"].append(f"{where}: {row['split']!r}")
            elif name in seen:
                first, first_label = seen[name]
                labels = "again" if first_label == label else f"as {label!r}, but as {first_label!r} in row {first}"
                bad["repeats an image of another row"].append(f"{where}: {row['path']} {labels}")
            else:
                seen[name] = number, label
                entries.append((name, label, split, row["group"]))
        for reason, rows in bad.items():
            text = f"data.root: {file}: {len(rows)} rows, each {reason}. Correct or remove {quote_names(rows)}."
            findings.append(Finding("refused", "bad row", text, tuple(rows)))
        labels_of: dict[str, set[str]] = defaultdict(set)
        for _, label, split, _ in entries:
            labels_of[split].add(label)
        spelling = train_spelling(labels_of)
        self.classes = tuple(sorted({name for split_names in spelling.values() for name in split_names.values()}))
        index = {label: number for number, label in enumerate(self.classes)}
        splits: dict[str, list[Sample]] = {"train": []}
        for name, label, split, group in entries:
            splits.setdefault(split, []).append(Sample(name, index[spelling[split][label]], group))
        self.splits = splits
        self.findings = (
            *findings,
            *class_findings(f"data.root: {file}", self.classes, splits),
            *name_findings(self.classes),
            *_group_findings(splits),
        )


def _group_findings(splits: Mapping[str, Sequence[Sample]]) -> Iterator[Finding]:
    splits_of: dict[str, set[str]] = defaultdict(set)
    for split, samples in splits.items():
        for sample in samples:
            if sample.group:
                splits_of[sample.group].add(split)
    divided = {group: None for group, names in splits_of.items() if len(names) > 1}
    if divided:
        text = (
            f"{len(divided)} groups are in more than one split, so evaluation data overlaps training data: "
            f"{quote_names(divided)}."
        )
        names = tuple(sample.name for samples in splits.values() for sample in samples if sample.group in divided)
        yield Finding("problem", "group in two splits", text, names)


def read_table(
    file: Path, required: Sequence[str] = ("path", "label"), option: str = "data.root"
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table with their numbers; the header is row 1.

    Args:
        file: A CSV, TSV or Parquet file.
        required: Columns that it must have.
        option: The flag that names the table, for messages.

    Raises:
        DataError: The table does not exist, cannot be read, or lacks a column.
    """
    if not file.is_file():
        raise DataError(f"{option}: table {file} does not exist.")
    separator = TABLES[file.suffix.lower()]
    try:
        names, rows = _read_parquet(file, option) if separator is None else _read_text(file, separator)
    except UnicodeDecodeError as error:
        raise DataError(f"{option}: {file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{option}: {file} cannot be read as a table: {error}.") from error
    normalized = [name.strip().lower() for name in names]
    repeated = next((name for name in COLUMNS if normalized.count(name) > 1), None)
    if repeated:
        raise DataError(f"{option}: {file} has two columns named {repeated}. Keep one.")
    missing = [name for name in required if name not in normalized]
    if missing:
        optional = ", and optionally split and group" if "label" in required else ""
        raise DataError(
            f"{option}: {file} has no column named {' or '.join(missing)}, only {quote_names(names) or 'none'}. "
            f"The header must contain {' and '.join(required)}{optional}."
        )
    columns = {name: normalized.index(name) for name in COLUMNS if name in normalized}
    for number, values in enumerate(rows, 2):
        if len(values) > len(names):
            raise DataError(
                f"{option}: {file}: row {number} has {len(values)} fields, but the header has {len(names)}. "
                "Quote fields that contain a comma."
            )
        if any(values):
            row = {name: values[column] for name, column in columns.items() if column < len(values)}
            yield number, {name: row.get(name, "") for name in COLUMNS}


def _read_text(file: Path, separator: str) -> tuple[list[str], list[list[str]]]:
    content = file.read_bytes()
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # first, as BOM_UTF16_LE is a prefix of it
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # "Unicode text" of spreadsheets
        encoding = "utf-16"
    text = io.StringIO(content.decode(encoding), newline="")
    rows = list(csv.reader(text, delimiter=separator, skipinitialspace=True, strict=True))
    return (rows[0], rows[1:]) if rows else ([], [])


def _read_parquet(file: Path, option: str) -> tuple[list[str], list[list[str]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file}: Parquet files need pyarrow: pip install 'frozen-backbone[parquet]'") from error
    try:
        table: Any = parquet.read_table(file)
    except ArrowException as error:
        raise DataError(f"{option}: {file} cannot be read as a table: {error}.") from error
    columns = [[_as_text(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(row) for row in zip(*columns, strict=True)]


def _as_text(value: Any) -> str:
    if value is None or value != value:  # pandas writes missing values as NaN
        return ""
    return value.decode() if isinstance(value, bytes) else str(value)
