"""File formats of predictions: CSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from project.callbacks.prediction_columns import DIGITS, SEPARATOR, Column, Value
from project.errors import ConfigError

Rows = Sequence[Sequence[Value]]


class PredictionFormat(ABC):
    r"""Writes tables of predictions.

    Bytes of a file name that are not UTF-8 are written as ``\udcXX``, as Python does.
    """

    @abstractmethod
    def write(self, path: Path, columns: Sequence[Column], rows: Rows) -> None:
        """Write a part of a table.

        Args:
            path: The file.
            columns: The columns.
            rows: A value for each column, for each image.
        """

    @abstractmethod
    def merge(self, parts: Iterable[Path], path: Path, columns: Sequence[Column]) -> None:
        """Merge parts to a table, in constant memory.

        Args:
            parts: Files written by :meth:`write`, in order.
            path: The file to write.
            columns: The columns.
        """

    def require(self) -> None:  # noqa: B027 - most formats need no package
        """Check that the packages of the format are installed.

        Raises:
            ConfigError: A package is missing.
        """


class TextFormat(PredictionFormat):
    """A format whose parts, concatenated after a header, are the table."""

    @abstractmethod
    def header(self, columns: Sequence[Column]) -> str:
        """Text before the first row."""

    @abstractmethod
    def text(self, columns: Sequence[Column], rows: Rows) -> str:
        """Text of rows."""

    def write(self, path: Path, columns: Sequence[Column], rows: Rows) -> None:
        """Write the rows without the header."""
        path.write_bytes(_encoded(self.text(columns, rows)))

    def merge(self, parts: Iterable[Path], path: Path, columns: Sequence[Column]) -> None:
        """Concatenate the header and the parts."""
        with path.open("wb") as file:
            file.write(_encoded(self.header(columns)))
            for part in parts:
                with part.open("rb") as content:
                    shutil.copyfileobj(content, file)


class CsvFormat(TextFormat):
    """CSV. Flags are ``yes`` and ``no``, missing values are empty, and the items of a list are separated by ``|``."""

    def header(self, columns: Sequence[Column]) -> str:
        """The names of the columns."""
        return _csv_text([[column.name for column in columns]])

    def text(self, columns: Sequence[Column], rows: Rows) -> str:
        """A line for each image; a line break in a file name is quoted."""
        return _csv_text([[_csv_cell(value) for value in row] for row in rows])


def _csv_text(rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _csv_cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return SEPARATOR.join(value)
    return f"{value:.{DIGITS}f}" if isinstance(value, float) else value


class JsonLinesFormat(TextFormat):
    """JSON Lines: an object for each image, with the names of the columns as keys."""

    def header(self, columns: Sequence[Column]) -> str:
        """None."""
        return ""

    def text(self, columns: Sequence[Column], rows: Rows) -> str:
        """A line for each image."""
        names = [column.name for column in columns]
        objects = ({name: _json_value(value) for name, value in zip(names, row, strict=True)} for row in rows)
        # A byte that is not UTF-8 is written as \udcXX, which is also its escape in JSON.
        lines = (json.dumps(item, ensure_ascii=False, allow_nan=False) for item in objects)
        return "".join(f"{line}\n" for line in lines)


def _json_value(value: Value) -> Value:
    """The value; ``None`` for NaN, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value


class ParquetFormat(PredictionFormat):
    """Parquet."""

    def require(self) -> None:
        """Check that pyarrow is installed."""
        if importlib.util.find_spec("pyarrow") is None:
            raise ConfigError("--output: Parquet files need pyarrow: pip install 'frozen-backbone[parquet]'")

    def write(self, path: Path, columns: Sequence[Column], rows: Rows) -> None:
        """Write a Parquet file."""
        import pyarrow
        from pyarrow import parquet

        values = [[_as_unicode(row[index]) for row in rows] for index in range(len(columns))]
        arrays = {column.name: part for column, part in zip(columns, values, strict=True)}
        parquet.write_table(pyarrow.table(arrays, schema=_schema(columns)), path)

    def merge(self, parts: Iterable[Path], path: Path, columns: Sequence[Column]) -> None:
        """Copy the row groups of all parts."""
        from pyarrow import parquet

        with parquet.ParquetWriter(path, _schema(columns)) as writer:
            for part in parts:
                writer.write_table(parquet.read_table(part))


def _schema(columns: Sequence[Column]) -> Any:
    import pyarrow

    types = {
        "text": pyarrow.string(),
        "number": pyarrow.float64(),
        "flag": pyarrow.bool_(),
        "list": pyarrow.list_(pyarrow.string()),
    }
    return pyarrow.schema([(column.name, types[column.kind]) for column in columns])


def _as_unicode(value: Value) -> Value:
    if isinstance(value, list):
        return [_encoded(item).decode() for item in value]
    return _encoded(value).decode() if isinstance(value, str) else value


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


#: Formats by the suffix of the file.
FORMATS: Mapping[str, PredictionFormat] = {
    ".csv": CsvFormat(),
    ".jsonl": JsonLinesFormat(),
    ".parquet": ParquetFormat(),
}
