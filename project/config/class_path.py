"""A class with its arguments, as the command line reads it, a checkpoint holds it and a report prints it."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from project.config.import_allowlist import is_importable, refused, takes_if_imported
from project.errors import ConfigError, ProjectError, abbreviate


@dataclass(frozen=True)
class ClassSpec:
    """A class by its path, and its arguments, in plain types that a checkpoint can hold.

    Attributes:
        class_path: ``package.module.Class``.
        init_args: Keyword arguments.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, factory: Callable[..., Any] | Mapping[str, Any]) -> ClassSpec:
        """Describe a factory.

        Args:
            factory: A class, a :func:`functools.partial` of a class with keyword arguments, or ``{"class_path": ...,
                "init_args": {...}}``.

        Raises:
            ConfigError: It is something else, such as a lambda, that a checkpoint could not bring back.
        """
        if isinstance(factory, Mapping):
            return cls.from_dict(factory)
        target, arguments = factory, {}
        if isinstance(factory, functools.partial) and not factory.args:
            target, arguments = factory.func, dict(factory.keywords)
        if not isinstance(target, type) or "<locals>" in target.__qualname__:
            raise ConfigError(
                f"{factory!r} cannot be kept in a checkpoint: "
                "use a class of a module, or functools.partial(Class, key=value)."
            )
        return cls(f"{target.__module__}.{target.__qualname__}", arguments)

    @classmethod
    def from_dict(cls, found: Any, key: str = "") -> ClassSpec:
        """Read ``{"class_path": ..., "init_args": {...}}``.

        Args:
            found: What a config or a checkpoint has.
            key: Where it stands in the configuration, for the message.

        Raises:
            ConfigError: It is of another form.
        """
        path, arguments = (
            (found.get("class_path"), found.get("init_args") or {}) if isinstance(found, Mapping) else 2 * (None,)
        )
        if (
            not isinstance(path, str)
            or not path
            or not isinstance(arguments, Mapping)
            or not all(isinstance(key, str) for key in arguments)
        ):
            reason = f"no class_path with init_args, but {abbreviate(found)}."
            raise ConfigError("{path}: {reason}", path=key, reason=reason) if key else ConfigError(reason)
        return cls(path, dict(arguments))

    def as_dict(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}``."""
        return {"class_path": self.class_path, "init_args": dict(self.init_args)}

    @property
    def name(self) -> str:
        """The class's name without its module."""
        return self.class_path.rpartition(".")[2]

    def resolve(self, base: type | tuple[type, ...]) -> Callable[..., Any]:
        """Find the class, and bind its arguments.

        Only what :mod:`project.config.import_allowlist` lists is imported. From Python, a class of another package is
        accepted once its module has been imported by the caller; from the command line, where nobody has, it is not.
        So a checkpoint from a stranger cannot make this process import or call what it likes.

        Args:
            base: What the class has to be a subclass of.

        Returns:
            The class with its arguments bound.

        Raises:
            ConfigError: The class is not there, not allowed, or not of that kind.
        """
        module_name, _, name = self.class_path.rpartition(".")
        if is_importable(self.class_path):
            try:
                module = importlib.import_module(module_name)
            except ImportError as error:
                raise ConfigError(f"class_path {self.class_path!r} cannot be imported: {error}.") from error
        elif takes_if_imported(self.class_path) and module_name in sys.modules:
            module = sys.modules[module_name]
        else:
            raise ConfigError(refused(self.class_path))
        found = getattr(module, name, None)
        if not (isinstance(found, type) and issubclass(found, base)):
            kinds = base if isinstance(base, tuple) else (base,)
            raise ConfigError(
                f"class_path {self.class_path!r} is not a {' or '.join(kind.__name__ for kind in kinds)}."
            )
        real = f"{found.__module__}.{found.__qualname__}"  # a module has other modules' classes too
        if not is_importable(real) and not takes_if_imported(real):
            raise ConfigError(refused(real))
        return functools.partial(found, **self.init_args)

    def construct(self, key: str, base: type | tuple[type, ...], *inputs: Any) -> Any:
        """Make an object of the class.

        Args:
            key: Where the class stands in the configuration, for the message.
            base: What the class has to be a subclass of.
            inputs: Positional arguments that the class takes before its own.

        Raises:
            ConfigError: The class may not be used, or does not take these arguments.
        """
        try:
            return self.resolve(base)(*inputs)
        except ProjectError as error:
            raise type(error)("{path}: {reason}", path=key, reason=error) from error
        except Exception as error:  # what a class makes of arguments that are not for it can be anything
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ConfigError(f"{key}: {self.class_path} does not take these arguments: {reason}.") from error
