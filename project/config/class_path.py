"""Parts named by ``class_path``: heads, optimizers and schedulers, as plain types that a checkpoint can hold."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from project.config.import_allowlist import is_importable, refused, takes_if_imported
from project.errors import ConfigError, ProjectError, shown

Spec = Mapping[str, Any]


def describe(factory: Callable[..., Any] | Spec) -> dict[str, Any]:
    """Put a factory into plain types: ``{"class_path": ..., "init_args": {...}}``.

    Args:
        factory: A class, a :func:`functools.partial` of a class with keyword arguments, or a description already.

    Raises:
        ConfigError: It is something else, such as a lambda, that a checkpoint could not bring back.
    """
    if isinstance(factory, Mapping):
        return {"class_path": factory["class_path"], "init_args": dict(factory.get("init_args") or {})}
    target, arguments = factory, {}
    if isinstance(factory, functools.partial) and not factory.args:
        target, arguments = factory.func, dict(factory.keywords)
    if not isinstance(target, type) or "<locals>" in target.__qualname__:
        raise ConfigError(
            f"{factory!r} cannot be kept in a checkpoint: "
            "use a class of a module, or functools.partial(Class, key=value)."
        )
    return {"class_path": f"{target.__module__}.{target.__qualname__}", "init_args": arguments}


def resolve(spec: Spec, base: type | tuple[type, ...]) -> Callable[..., Any]:
    """Find the class that a description names, and bind its arguments.

    Only what :mod:`project.config.import_allowlist` lists is imported. From Python, a class of another package is
    accepted once its module has been imported by the caller; from the command line, where nobody has, it is not. So a
    checkpoint from a stranger cannot make this process import or call what it likes.

    Args:
        spec: ``{"class_path": ..., "init_args": {...}}``.
        base: What the class has to be a subclass of.

    Returns:
        The class with its arguments bound.

    Raises:
        ConfigError: The class is not there, not allowed, or not of that kind.
    """
    path, arguments = spec.get("class_path", ""), spec.get("init_args") or {}
    if (
        not isinstance(path, str)
        or not path
        or not isinstance(arguments, Mapping)
        or not all(isinstance(k, str) for k in arguments)
    ):
        raise ConfigError(f"no class_path with init_args, but {shown(spec)}.")
    module_name, _, name = path.rpartition(".")
    if is_importable(path):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(f"class_path {path!r} cannot be imported: {error}.") from error
    elif takes_if_imported(path) and module_name in sys.modules:
        module = sys.modules[module_name]
    else:
        raise ConfigError(refused(path))
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        kinds = base if isinstance(base, tuple) else (base,)
        raise ConfigError(f"class_path {path!r} is not a {' or '.join(kind.__name__ for kind in kinds)}.")
    real = f"{found.__module__}.{found.__qualname__}"  # a module has other modules' classes too
    if not is_importable(real) and not takes_if_imported(real):
        raise ConfigError(refused(real))
    return functools.partial(found, **arguments)


def construct(key: str, spec: Spec, base: type | tuple[type, ...], *inputs: Any) -> Any:
    """Make what a description names.

    Args:
        key: Where the description stands in the configuration, for the message.
        spec: ``{"class_path": ..., "init_args": {...}}``.
        base: What the class has to be a subclass of.
        inputs: Positional arguments that the class takes before those of the description.

    Raises:
        ConfigError: The class may not be used, or does not take these arguments.
    """
    try:
        return resolve(spec, base)(*inputs)
    except ProjectError as error:
        raise type(error)("{path}: {reason}", path=key, reason=error) from error
    except Exception as error:  # what a class makes of arguments that are not for it can be anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(f"{key}: {spec['class_path']} does not take these arguments: {reason}.") from error
