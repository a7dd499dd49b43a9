"""The order and the values of command-line arguments, before they are parsed."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path

import yaml

from project.errors import ConfigError


def split_checkpoint_flag(args: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """Split ``--ckpt_path`` from a command line; returns its values and the remaining arguments."""
    flag = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--ckpt_path", nargs="?", action="append", default=[])
    parsed, rest = flag.parse_known_args(args)
    return parsed.ckpt_path, rest


def validate_order(args: Sequence[str]) -> None:
    """Refuse a flag that a later, more general flag would override silently.

    A class flag (``--model.optimizer AdamW``) resets the arguments of the class (``--model.optimizer.lr 0.1``); a group
    flag (``--model '{optimizer: AdamW}'``, or a file) overrides the flags of its keys.

    Raises:
        ConfigError: A flag is followed by one that overrides it.
    """
    earlier_names: list[str] = []
    for arg, next_arg in zip_longest(args, args[1:], fillvalue=""):
        flag, equals, value = arg.partition("=")
        name = flag.removesuffix(".class_path")
        if not name.startswith("--"):
            continue
        overridden = [earlier for earlier in earlier_names if earlier.startswith(f"{name}.")]
        reason = "which starts from its class's own defaults"
        if "." not in name and overridden:
            keys = _group_keys(value if equals else next_arg)
            overridden = [earlier for earlier in overridden if earlier.split(".")[1].rstrip("+") in keys]
            reason = "which overrides it"
        if overridden:
            raise ConfigError(f"{overridden[0]} comes before {name}, {reason}. Put it after.")
        earlier_names.append(name)


def _group_keys(value: str) -> set[str]:
    """Top-level keys of a group flag's value: YAML or JSON, or the path of such a file."""
    try:
        content = yaml.safe_load(value)
        if isinstance(content, str):
            content = yaml.safe_load(Path(content).read_text())
    except (OSError, ValueError, yaml.YAMLError):  # reported by the parser
        return set()
    return {str(key) for key in content} if isinstance(content, Mapping) else set()


def config_files_first(args: Sequence[str]) -> list[str]:
    """Move config files before all other flags, so that flags override them wherever they are on the command line.

    Raises:
        ConfigError: A config file is not valid YAML, or has no settings.
    """
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg in ("-c", "--config"):
            files += [arg, *islice(remaining, 1)]
        elif arg.startswith("--config="):
            files.append(arg)
        else:
            rest.append(arg)
    for value in files:
        _validate_config_file(Path(value.removeprefix("--config=")).expanduser())
    return [*rest[:1], *files, *rest[1:]] if rest[:1] and not rest[0].startswith("-") else list(args)


def _validate_config_file(path: Path) -> None:
    """Check a config file. The parser's errors name neither the file nor the line."""
    if not path.is_file():
        return  # a flag, or refused by the parser
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8. Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: invalid YAML: {error.problem}.\nCorrect this line, or the one before it."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: invalid YAML: {str(error).splitlines()[0]}. Save it as plain text.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} has no settings. A config has sections, such as data: {{root: photos/}}.")
