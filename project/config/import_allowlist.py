"""What a name in a config, a flag or a checkpoint may import: one list, for the parser and for checkpoints."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from jsonargparse import set_parsing_settings

from project.errors import ConfigError

#: With all that lies under each. These hold parts, and what parts are made of. The rest of torch and the others
#: downloads, compiles, and loads libraries and pickles: ``loader: torch.ops.load_library`` would need no class at all.
IMPORTABLE = (
    "project",
    "torch.nn",
    "torch.optim",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.transforms",
    "torchmetrics.classification",
    *(f"lightning.{of}.{parts}" for of in ("pytorch", "fabric") for parts in ("accelerators", "plugins", "strategies")),
    *(f"lightning.pytorch.{parts}" for parts in ("callbacks", "loggers", "profilers")),
    "lightning.pytorch.cli.ReduceLROnPlateau",  # torch's, and which metric it watches
    "timm.layers",
    "timm.optim",
)
#: What under these is left out: it downloads and unpacks, or unpickles a file of the working directory.
BARRED = ("torchvision.datasets.utils", *(f"torchvision.datasets.{name}" for name in ("lsun", "LSUN", "LSUNClass")))
#: Of these the list alone decides, wherever they were imported: see :func:`takes_if_imported`.
LIBRARIES = {entry.partition(".")[0] for entry in IMPORTABLE} - {"project"}
#: What they come to, for people.
KNOWN = "project, torch.nn, torch.optim, and the parts of torchvision, torchmetrics, lightning and timm"

#: What may be imported besides, while the command line runs; ``None`` where Python code is the caller.
_more: ContextVar[tuple[str, ...] | None] = ContextVar("_more", default=None)


def allowed_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--allow_imports`` from a command line.

    The parser does not know this flag, so no config file can set it.

    Args:
        args: Command line, without the program's name.

    Returns:
        The names that may be imported besides the usual ones, and the other arguments.

    Raises:
        ConfigError: It is said without a value.
    """
    flag = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--allow_imports", action="append", default=[])
    try:
        found, rest = flag.parse_known_args(args)
    except ArgumentError as error:
        raise ConfigError("--allow_imports needs the name of a package, such as mypackage.") from error
    return [name for given in found.allow_imports for name in given.split(",")], rest


@contextmanager
def imports_limited(more: Sequence[str] = ()) -> Iterator[None]:
    """Let names import what is listed and nothing else, and the parser read configs from files alone.

    Args:
        more: Packages, modules or classes that may be imported as well.

    Raises:
        ConfigError: One is no such name.
    """
    try:
        # The parser holds the module that defines a class against the list too: ``torch.nn.modules.module.os.system``
        # is a name in torch.nn, of what is not.
        set_parsing_settings(import_path_denylist=["*", *BARRED], import_path_allowlist=[*IMPORTABLE, *more])
    except ValueError as error:
        raise ConfigError(f"--allow_imports takes names of packages such as mypackage, or several: a,b. {error}") from (
            error
        )
    set_parsing_settings(
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,  # Lightning allows it
        validate_subclass_spec_in_any=True,  # where anything goes, a class_path is still held against the list
        instantiate_subclass_spec_in_any=False,  # and is not made
    )
    token = _more.set(tuple(more))
    try:
        yield
    finally:
        _more.reset(token)
        # The parser's list can be added to, not put back: what the flag allowed is denied again.
        set_parsing_settings(import_path_denylist=[entry for entry in more if entry not in IMPORTABLE])


def is_importable(path: str) -> bool:
    """Whether a name is listed: of the entries that it lies under, the longest decides, as in the parser."""
    listed = dict.fromkeys(BARRED, False) | dict.fromkeys((*IMPORTABLE, *(_more.get() or ())), True)
    words = path.split(".")
    above = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((listed[entry] for entry in above if entry in listed), False)


def takes_if_imported(path: str) -> bool:
    """Whether a class is accepted once its module is imported: from Python, where someone has done that.

    Of the libraries above the list alone decides: they import much themselves that nobody has asked for.
    """
    return _more.get() is None and path.partition(".")[0] not in LIBRARIES


def refused(path: str) -> str:
    """Say that a name may not be imported, and the mend."""
    if _more.get() is not None:
        mend = f"--allow_imports {path.partition('.')[0]}"
    else:
        mend = "in Python, import its module first" if takes_if_imported(path) else "use it in a class of your own"
    return f"class_path {path!r} is outside {KNOWN}.\nIf you trust it and what it does: {mend}."
