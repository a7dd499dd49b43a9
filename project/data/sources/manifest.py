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
from project.data.sources.findings import class_findings, name_findings
from project.errors import DataError


class Manifest(Files):
    """A table of images: columns ``path`` and ``label``, and if you like ``split`` and ``group``.

    Paths are relative to the table's folder. A row without a split is for all splits to be held out of, as train is.

    Args:
        path: A CSV, TSV or Parquet file.
    """

    def __init__(self, path: str) -> None:
        self._file = Path(path).expanduser()
        self.name = self._file.stem

    def _prepare(self) -> None:
        file = self._file
        rows = _read_table(file)
        findings: list[Finding] = []
        bad: dict[str, list[str]] = defaultdict(list)
        taken: dict[str, tuple[int, str]] = {}
        entries: list[tuple[str, str, str, str]] = []
        for number, row in rows:
            where, label = f"row {number}", row["label"]
            split = SPLITS.get(row["split"].strip().lower() or "train")
            name = str(file.parent / row["path"])
            if not row["path"] or not label:
                bad["has no path or no label"].append(where)
            elif split is None:
                bad[f"has a split that is none of {', '.join(SPLITS)}"].append(f"{where}: {row['split']!r}")
            elif name in taken:
                first, other = taken[name]
                alike = "again" if other == label else f"as {label!r}, and as {other!r} in row {first}"
                bad["has an image that another row has"].append(f"{where}: {row['path']} {alike}")
            else:
                taken[name] = number, label
                entries.append((name, label, split, row["group"]))
        for what, places in bad.items():
            text = f"data.root: {file}: {len(places)} rows: each {what}. Mend or remove {quote_names(places)}."
            findings.append(Finding("refused", "bad row", text, tuple(places)))
        self.classes = tuple(sorted({label for _, label, _, _ in entries}))
        index = {label: number for number, label in enumerate(self.classes)}
        splits: dict[str, list[Sample]] = {"train": []}
        for name, label, split, group in entries:
            splits.setdefault(split, []).append(Sample(name, index[label], group))
        self.splits = splits
        listed = class_findings(f"data.root: {file}", self.classes, splits)
        self.findings = (*findings, *listed, *name_findings(self.classes), *_parted_groups(splits))


def _parted_groups(splits: Mapping[str, Sequence[Sample]]) -> Iterator[Finding]:
    where: dict[str, set[str]] = defaultdict(set)
    for split, samples in splits.items():
        for sample in samples:
            if sample.group:
                where[sample.group].add(split)
    parted = [group for group, parts in where.items() if len(parts) > 1]
    if parted:
        text = f"{len(parted)} groups are in two splits, so what is measured was trained on: {quote_names(parted)}."
        names = tuple(sample.name for part in splits.values() for sample in part if sample.group in set(parted))
        yield Finding("problem", "group in two splits", text, names)


COLUMNS = ("path", "label", "split", "group")
#: Endings of the names of tables.
TABLES = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".parquet": None, ".pq": None}


def _read_table(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their numbers in the file, of which the header is 1."""
    if not file.is_file():
        raise DataError(f"data.root: there is no table {file}.")
    separator = TABLES[file.suffix.lower()]
    try:
        names, rows = _read_parquet(file) if separator is None else _read_text(file, separator)
    except UnicodeDecodeError as error:
        raise DataError(f"data.root: {file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"data.root: {file} cannot be read as a table: {error}.") from error
    columns = {name.strip().lower(): index for index, name in enumerate(names)}
    twice = [name for name in COLUMNS if sum(other.strip().lower() == name for other in names) > 1]
    if twice:
        raise DataError(f"data.root: {file} has two columns {twice[0]}. Keep one.")
    lacking = [name for name in ("path", "label") if name not in columns]
    if lacking:
        raise DataError(
            f"data.root: {file} has no column {' and no '.join(lacking)}: it has {quote_names(names) or 'none'}. "
            "The first row names the columns: path,label, and if you like split and group."
        )
    for number, values in enumerate(rows, 2):
        if len(values) > len(names):
            raise DataError(
                f"data.root: {file}: row {number} has {len(values)} fields, and the first row {len(names)}. "
                "Quote what has a comma in it."
            )
        if any(values):
            yield (
                number,
                {
                    name: values[columns[name]] if name in columns and columns[name] < len(values) else ""
                    for name in COLUMNS
                },
            )


def _read_text(file: Path, separator: str) -> tuple[list[str], list[list[str]]]:
    content = file.read_bytes()
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first begins as UTF-16 does
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what a spreadsheet calls Unicode
        encoding = "utf-16"
    rows = list(
        csv.reader(
            io.StringIO(content.decode(encoding), newline=""),
            delimiter=separator,
            skipinitialspace=True,
            strict=True,
        )
    )
    return (rows[0], rows[1:]) if rows else ([], [])


def _read_parquet(file: Path) -> tuple[list[str], list[list[str]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{file}: Parquet files need pyarrow: pip install 'frozen-backbone[parquet]'") from error
    try:
        table: Any = parquet.read_table(file)
    except ArrowException as error:
        raise DataError(f"data.root: {file} cannot be read as a table: {error}.") from error
    columns = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    return list(table.column_names), [list(row) for row in zip(*columns, strict=True)]


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN, as pandas writes what is missing
        return ""
    return value.decode() if isinstance(value, bytes) else str(value)
