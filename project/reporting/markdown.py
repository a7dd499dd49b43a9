"""Markdown of model cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from project.evaluation.confidence_intervals import Interval


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_interval(interval: Interval | None) -> str:
    """An interval in three digits; empty for ``None``."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def plain(text: str) -> str:
    """Escape text for one line of Markdown: folder names may contain anything."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$@])", r"\\\1", line)


def code(text: str) -> str:
    """Inline code; backticks in the text are replaced."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def slug(text: str) -> str:
    """A valid Hugging Face data set identifier."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"
