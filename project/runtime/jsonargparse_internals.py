"""What jsonargparse offers no public name for; each function has a contract test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _typehints
from jsonargparse._util import import_object

DISCARD = "discard_init_args_on_class_path_change"


@contextmanager
def arguments_of_their_class() -> Iterator[None]:
    """While this is active, a class that replaces another one starts from its own defaults.

    jsonargparse keeps each argument that the new class takes as well: AdamW after SGD gets SGD's ``weight_decay``.
    """
    original = getattr(_typehints, DISCARD)
    setattr(_typehints, DISCARD, _discard)
    try:
        yield
    finally:
        setattr(_typehints, DISCARD, original)


def _discard(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Remove the arguments of a class from its specification, where another class replaces it."""
    if previous and "init_args" in previous and not _same(previous["class_path"], value["class_path"]):
        for key in list(previous["init_args"].keys()):
            previous["init_args"].pop(key)


def _same(one: str, other: str) -> bool:
    """Whether two paths name one class: ``torch.optim.SGD`` is ``torch.optim.sgd.SGD``."""
    if one.rpartition(".")[2] != other.rpartition(".")[2]:
        return False
    return one == other or import_object(one) is import_object(other)
