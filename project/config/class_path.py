"""A class path with arguments, as in configs, checkpoints and reports."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from project.config.import_allowlist import import_refusal, is_importable, is_usable_if_imported
from project.errors import ConfigError, ProjectError, abbreviate


@dataclass(frozen=True)
class ClassSpec:
    """Import path of a class and its keyword arguments, in plain types that a checkpoint can store.

    Attributes:
        class_path: ``package.module.Class``.
        init_args: Keyword arguments.
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, factory: Callable[..., Any] | Mapping[str, Any]) -> ClassSpec:
        """Create a specification from a factory.

        Args:
            factory: A class, a :func:`functools.partial` of a class with keyword arguments, or ``{"class_path": ...,
                "init_args": {...}}``.

        Raises:
            ConfigError: A checkpoint cannot store the factory, such as a lambda.
        """
        if isinstance(factory, Mapping):
            return cls.from_dict(factory)
        target, arguments = factory, {}
        if isinstance(factory, functools.partial) and not factory.args:
            target, arguments = factory.func, dict(factory.keywords)
        if not isinstance(target, type) or "<locals>" in target.__qualname__:
            raise ConfigError(
                f"{factory!r} cannot be stored in a checkpoint: "
                "use a module-level class or functools.partial(Class, key=value)."
            )
        return cls(f"{target.__module__}.{target.__qualname__}", arguments)

    @classmethod
    def from_dict(cls, value: Any, key: str = "") -> ClassSpec:
        """Create a specification from ``{"class_path": ..., "init_args": {...}}``.

        Args:
            value: Value from a config or a checkpoint.
            key: Its configuration key, for the error message.

        Raises:
            ConfigError: The value has another form.
        """
        entries: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        path, arguments = entries.get("class_path") or "", entries.get("init_args") or {}
        is_valid = path and isinstance(path, str) and isinstance(arguments, Mapping)
        if not is_valid or not all(isinstance(name, str) for name in arguments):
            reason = f"expected class_path with init_args, not {abbreviate(value)}."
            raise ConfigError("{path}: {reason}", path=key, reason=reason) if key else ConfigError(reason)
        return cls(path, dict(arguments))

    def as_dict(self) -> dict[str, Any]:
        """Convert to ``{"class_path": ..., "init_args": {...}}``."""
        return {"class_path": self.class_path, "init_args": dict(self.init_args)}

    @property
    def name(self) -> str:
        """Class name without its module."""
        return self.class_path.rpartition(".")[2]

    def resolve(self, base: type | tuple[type, ...]) -> Callable[..., Any]:
        """Import the class and bind its arguments.

        Only names in :mod:`project.config.import_allowlist` are imported, so that an untrusted checkpoint cannot import
        or call arbitrary code. In Python, but not on the command line, a class of another package is also accepted if
        its module is already imported.

        Args:
            base: Required base class or classes.

        Returns:
            The class with its arguments bound.

        Raises:
            ConfigError: The class does not exist, is not allowed, or has another base class.
        """
        module_name, _, name = self.class_path.rpartition(".")
        if is_importable(self.class_path):
            try:
                module = importlib.import_module(module_name)
            except ImportError as error:
                raise ConfigError(f"class_path {self.class_path!r} cannot be imported: {error}.") from error
        elif is_usable_if_imported(self.class_path) and module_name in sys.modules:
            module = sys.modules[module_name]
        else:
            raise ConfigError(import_refusal(self.class_path))
        kind = getattr(module, name, None)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            bases = base if isinstance(base, tuple) else (base,)
            raise ConfigError(
                f"class_path {self.class_path!r} is not a {' or '.join(base.__name__ for base in bases)}."
            )
        defined_at = f"{kind.__module__}.{kind.__qualname__}"  # an allowed module may import classes from others
        if not is_importable(defined_at) and not is_usable_if_imported(defined_at):
            raise ConfigError(import_refusal(defined_at))
        return functools.partial(kind, **self.init_args)

    def construct(self, key: str, base: type | tuple[type, ...], *inputs: Any) -> Any:
        """Instantiate the class.

        Args:
            key: Configuration key of the class, for the error message.
            base: Required base class or classes.
            inputs: Positional arguments before the keyword arguments.

        Raises:
            ConfigError: The class is not allowed, or does not accept the arguments.
        """
        try:
            return self.resolve(base)(*inputs)
        except ProjectError as error:
            raise type(error)("{path}: {reason}", path=key, reason=error) from error
        except Exception as error:  # a class may raise anything for invalid arguments
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ConfigError(f"{key}: {self.class_path} does not accept these arguments: {reason}.") from error
