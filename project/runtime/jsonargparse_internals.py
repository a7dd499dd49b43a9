"""All use of jsonargparse's private API. Each function has a contract test."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import _required, _typehints
from jsonargparse._util import import_object

from project.runtime.lightning_cli import option_names


@contextmanager
def class_change_resets_arguments(optional: Collection[str] = ()) -> Iterator[None]:
    """While active, a class that replaces another one starts from its own default arguments.

    jsonargparse keeps every argument that the new class also accepts: AdamW after SGD gets SGD's ``weight_decay``.

    Args:
        optional: Names of required class arguments that may be omitted.
    """
    class_parser = _typehints.ActionTypeHint.get_class_parser

    def without_required(*args: Any, **kwargs: Any) -> Any:
        parser = class_parser(*args, **kwargs)  # type: ignore[no-untyped-call]
        for name in option_names(parser):
            if name in optional:
                _required.clear_required(parser, name)
        return parser

    with (
        _patched(_typehints, "discard_init_args_on_class_path_change", _discard_init_args),
        _patched(_typehints.ActionTypeHint, "get_class_parser", staticmethod(without_required)),
    ):
        yield


def accepted_class_paths(parser: ArgumentParser, key: str) -> list[str]:
    """Import paths of the already imported classes that an option accepts, such as ``torch.optim.SGD``."""
    typehint = next((getattr(action, "_typehint", None) for action in parser._actions if action.dest == key), None)
    bases = _typehints.get_subclass_types(typehint, also_lists=True, callable_return=True) or ()  # type: ignore[no-untyped-call]
    return [path for base in bases for path in _typehints.get_all_subclass_paths(base)]


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _discard_init_args(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Remove the ``init_args`` of the previous class if the new value is another class."""
    if previous and "init_args" in previous and not _is_same_class(previous["class_path"], value["class_path"]):
        for key in list(previous["init_args"].keys()):
            previous["init_args"].pop(key)


def _is_same_class(path: str, other_path: str) -> bool:
    """Whether two import paths name one class: ``torch.optim.SGD`` is ``torch.optim.sgd.SGD``."""
    if path.rpartition(".")[2] != other_path.rpartition(".")[2]:
        return False
    return path == other_path or import_object(path) is import_object(other_path)
