"""Lightning's dictionary of a scheduler, ``{scheduler, interval, frequency, monitor}``, as settings of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from project.errors import ConfigError

#: Setting of the model for each key of the dictionary. The monitor is an argument of ReduceLROnPlateau.
SETTINGS = {"scheduler": "scheduler", "interval": "scheduler_interval", "frequency": "scheduler_frequency"}
MONITOR = "monitor"
PLATEAU = "lightning.pytorch.cli.ReduceLROnPlateau"  # torch's scheduler with the name of its metric


def expand_scheduler(args: Sequence[str]) -> list[str]:
    """Replace the dictionary in flags and config files by settings of the model, which the parser knows.

    Args:
        args: Command line. A config file with a dictionary becomes a YAML text, which the parser accepts as well.

    Raises:
        ConfigError: A key of the dictionary has no effect, or contradicts a setting.
    """
    expanded: list[str] = []
    given = {flag.removeprefix("--model."): value for flag, value, _ in _flags(args)}
    for flag, value, words in _flags(args):
        content: Any = _load(value, reads_files=flag != "--model.scheduler") if flag else None
        if flag == "--model.scheduler" and _is_dictionary(content):
            for name, setting in _settings(content, given).items():
                expanded += [f"--model.{name}", _dump(setting)]
        elif flag == "--model" and _is_dictionary(_get(content, "scheduler")):
            expanded += [flag, _dump(_expanded(content))]
        elif flag in ("-c", "--config") and _is_dictionary(_get(_get(content, "model"), "scheduler")):
            expanded += [flag, _dump({**content, "model": _expanded(content["model"])})]
        else:
            expanded += words
    return expanded


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The flags that can have a dictionary or contradict one, with value and words; other words with an empty flag."""
    names = ("-c", "--config", "--model", *(f"--model.{name}" for name in SETTINGS.values()))
    remaining = iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        if flag not in names:
            yield "", "", [arg]
        elif equals:
            yield flag, value, [arg]
        elif (following := next(remaining, None)) is None:
            yield "", "", [arg]  # reported by the parser
        else:
            yield flag, following, [arg, following]


def _load(value: str, reads_files: bool = False) -> Any:
    """Content of a flag's value, or of its file, as the parser loads it; ``None`` for what the parser reports."""
    try:
        content = get_loader("yaml")(value)
        if reads_files and isinstance(content, str):
            content = get_loader("yaml")(Path(content).expanduser().read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return content


def _get(content: Any, key: str) -> Any:
    return content.get(key) if isinstance(content, Mapping) else None


def _is_dictionary(value: Any) -> bool:
    return isinstance(value, Mapping) and "scheduler" in value


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9)
    return text.removesuffix("...\n").strip()


def _expanded(model: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, **_settings(model["scheduler"], model)}


def _settings(dictionary: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the model.

    Args:
        dictionary: Lightning's.
        others: Settings of the model that are given beside it.
    """
    unknown = [key for key in dictionary if key not in (*SETTINGS, MONITOR)]
    if unknown:
        raise ConfigError(
            f"model.scheduler: the key {unknown[0]} is not supported. Use scheduler, interval, frequency and monitor."
        )
    given = {key: value for key, value in dictionary.items() if key == "scheduler" or value is not None}
    settings = {name: given[key] for key, name in SETTINGS.items() if key in given}
    for key, name in [*SETTINGS.items()][1:]:
        if name in settings and name in others and str(others[name]) != str(settings[name]):
            raise ConfigError(
                f"model.scheduler.{key} is {settings[name]}, but model.{name} is {others[name]}. Remove one of them."
            )
    if MONITOR in given:
        settings["scheduler"] = _with_monitor(given["scheduler"], given[MONITOR])
    return settings


def _with_monitor(scheduler: Any, monitor: Any) -> dict[str, Any]:
    described = scheduler if isinstance(scheduler, Mapping) else {"class_path": scheduler}
    name, arguments = str(described.get("class_path")).rpartition(".")[2], described.get("init_args") or {}
    if name != "ReduceLROnPlateau":
        raise ConfigError(f"model.scheduler.monitor applies only to ReduceLROnPlateau, not to {name}. Remove it.")
    if arguments.get(MONITOR, monitor) != monitor:
        raise ConfigError(
            f"model.scheduler.monitor is {monitor}, but that of ReduceLROnPlateau is {arguments[MONITOR]}. Remove one."
        )
    return {"class_path": PLATEAU, "init_args": {**arguments, MONITOR: monitor}}
