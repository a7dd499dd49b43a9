"""A parser's errors, in one line that says which key, and what it could have been."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError, ArgumentParser

from project.components import resolve
from project.errors import ConfigError, nearest

UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>--[\w.]+)"
    r"|(?:Group '(?P<group>[\w.]+)'|(?P<top>Parser)) does not accept option '(?P<key>[\w.]+)'"
    r"|Parser key \"(?P<part>[\w.]+)\".*?Option '(?P<argument>[\w.]+)' is not accepted.*?class_path='(?P<path>[\w.]+)'"
    r"|(?P<other>[\w.]+) is not expected",
    re.DOTALL,
)


def explain(error: ArgumentError, parser: ArgumentParser) -> ConfigError:
    """Say what is wrong with a flag or a config file.

    Args:
        error: What the parser raised.
        parser: The verb's parser, whose keys are known.
    """
    message = str(error)
    found = UNKNOWN.search(message)
    if found is None:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        kept = lines[:2] + [line for line in lines[2:] if line.startswith(("Given value:", "Expected"))]
        return ConfigError(" ".join(kept).replace("Parser key ", ""))
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]
    part = found.groupdict()
    if part["flag"]:
        return ConfigError(f"unknown flag {part['flag']}. {nearest(part['flag'], [f'--{k}' for k in keys])}See --help.")
    if part["argument"]:
        known = list(inspect.signature(resolve({"class_path": part["path"]}, object)).parameters)
        place = f"{part['part']} ({part['path']})"
        return ConfigError(f"unknown key {part['argument']!r} in {place}. {nearest(part['argument'], known)}It takes {', '.join(known)}.")
    word = part["key"] or part["other"]
    if part["group"]:
        keys = [key.removeprefix(f"{part['group']}.") for key in keys if key.startswith(f"{part['group']}.")]
    else:
        keys = [key.split(".")[0] for key in keys]
    place = f" in {part['group']}" if part["group"] else ""
    return ConfigError(f"unknown key {word!r}{place}. {nearest(word, dict.fromkeys(keys))}See --help.")
