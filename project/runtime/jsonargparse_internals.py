"""What jsonargparse offers no public name for; each function has a contract test."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _required, _typehints
from jsonargparse._util import import_object

from project.runtime.lightning_cli import option_names


@contextmanager
def arguments_of_their_class(optional: Collection[str] = ()) -> Iterator[None]:
    """While this is active, a class that replaces another one starts from its own defaults.

    jsonargparse keeps each argument that the new class takes as well: AdamW after SGD gets SGD's ``weight_decay``.

    Args:
        optional: Arguments of classes that need not be given, although they have no default.
    """
    class_parser = _typehints.ActionTypeHint.get_class_parser

    def without_required(*arguments: Any, **options: Any) -> Any:
        parser = class_parser(*arguments, **options)  # type: ignore[no-untyped-call]
        for name in option_names(parser):
            if name in optional:
                _required.clear_required(parser, name)
        return parser

    with (
        _replaced(_typehints, "discard_init_args_on_class_path_change", _discard),
        _replaced(_typehints.ActionTypeHint, "get_class_parser", staticmethod(without_required)),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


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
