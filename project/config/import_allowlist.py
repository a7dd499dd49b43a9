"""Allowlist of imports for class paths in configs, flags and checkpoints."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from jsonargparse import set_parsing_settings

from project.errors import ConfigError

#: Importable packages, modules and classes, with everything below them. Other parts of these libraries download,
#: compile, unpickle or load shared libraries, and need no class for it: ``loader: torch.ops.load_library``.
ALLOWED = (
    "project",
    "torch.nn",
    "torch.optim",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.transforms",
    "torchmetrics.classification",
    *(
        f"lightning.{package}.{part}"
        for package in ("pytorch", "fabric")
        for part in ("accelerators", "plugins", "strategies")
    ),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "profilers")),
    "lightning.pytorch.cli.ReduceLROnPlateau",  # torch's scheduler with the name of its metric
    "timm.layers",
    "timm.optim",
)
#: Exceptions below the allowed names: they download and unpack archives, or unpickle a file of the working directory.
EXCLUDED = ("torchvision.datasets.utils", *(f"torchvision.datasets.{name}" for name in ("lsun", "LSUN", "LSUNClass")))
#: Libraries for which the list decides even if a module is already imported: see :func:`is_usable_if_imported`.
LIBRARIES = {entry.partition(".")[0] for entry in ALLOWED} - {"project"}
#: Summary of the list for error messages.
ALLOWED_SUMMARY = "project, torch.nn, torch.optim, and parts of torchvision, torchmetrics, lightning and timm"

#: Names of ``--allow_imports`` while the command line runs; ``None`` when used from Python.
_extra_allowed: ContextVar[tuple[str, ...] | None] = ContextVar("_extra_allowed", default=None)


def split_allow_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``--allow_imports`` from a command line. The main parser does not define it, so no config file can set it.

    Args:
        args: Command line, without the program's name.

    Returns:
        Additional names that may be imported, and the remaining arguments.

    Raises:
        ConfigError: The flag has no value.
    """
    flag = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--allow_imports", action="append", default=[])
    try:
        parsed, rest = flag.parse_known_args(args)
    except ArgumentError as error:
        raise ConfigError("--allow_imports needs the name of a package, such as mypackage.") from error
    return [name for names in parsed.allow_imports for name in names.split(",")], rest


@contextmanager
def restricted_imports(extra: Sequence[str] = ()) -> Iterator[None]:
    """Restrict class paths to the allowlist, and configs to local files, while the command line runs.

    Args:
        extra: Additional packages, modules or classes to allow.

    Raises:
        ConfigError: An additional name is not valid.
    """
    try:
        # The parser also checks the module that defines a class: ``torch.nn.modules.module.os.system`` is a name in
        # torch.nn, but defined elsewhere.
        set_parsing_settings(import_path_denylist=["*", *EXCLUDED], import_path_allowlist=[*ALLOWED, *extra])
    except ValueError as error:
        raise ConfigError(f"--allow_imports takes package names, separated by commas: a,b. {error}") from error
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # Lightning enables it
        validate_subclass_spec_in_any=True,  # checks class_path against the list also where the type is Any
        instantiate_subclass_spec_in_any=False,  # but does not instantiate it
    )
    token = _extra_allowed.set(tuple(extra))
    try:
        yield
    finally:
        _extra_allowed.reset(token)
        # The parser's allowlist cannot shrink, so the additional names are denied again.
        set_parsing_settings(import_path_denylist=[entry for entry in extra if entry not in ALLOWED])


def is_importable(path: str) -> bool:
    """Whether a name is allowed. The longest matching entry decides, as in the parser."""
    rules = dict.fromkeys(EXCLUDED, False) | dict.fromkeys((*ALLOWED, *(_extra_allowed.get() or ())), True)
    parts = path.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), False)


def is_usable_if_imported(path: str) -> bool:
    """Whether an unlisted class is accepted if its module is already imported, which holds in Python only.

    Not for the libraries of the list: they import many modules that the user did not ask for.
    """
    return _extra_allowed.get() is None and path.partition(".")[0] not in LIBRARIES


def import_refusal(path: str) -> str:
    """Error message for a name that is not allowed, with the fix."""
    if _extra_allowed.get() is not None:
        fix = f"--allow_imports {path.partition('.')[0]}"
    else:
        fix = "import its module first" if is_usable_if_imported(path) else "wrap it in a class of your own"
    return f"class_path {path!r} is outside the allowed imports: {ALLOWED_SUMMARY}.\nIf you trust it: {fix}."
