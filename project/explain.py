"""A parser's errors, in one line that says which key, and what it could have been."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError, ArgumentParser

from project.components import resolve
from project.errors import ConfigError, nearest
from project.imports import refused

UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>--[\w.]+)"
    r"|(?:Group '(?P<group>[\w.]+)'|Parser|Subcommand '\w+') does not accept option '(?P<key>[\w.]+)'"
    r"|Parser key \"(?P<part>[\w.]+)\".*?Option '(?P<argument>[\w.]+)' is not accepted.*?class_path='(?P<path>[\w.]+)'",
    re.DOTALL,
)
#: What the parser says of a name that may not be imported. Of a union's kinds, others may have had other objections.
DENIED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed, denied by")
#: A config, or a part of one, by its address.
ELSEWHERE = re.compile(
    r"(?:config|exist|import path\S*|accessible|format:?|class|path):? ['\"]?(?P<place>\w[\w.+:]*://[^\s'\"]*)"
)
#: A part that lacks an argument, once it is said in plainer words.
LACKS = re.compile(r"^([\w.]+): it needs (\w+)$")
#: How the parser names types, and how people do.
PLAINER = (
    (r"Parser key \"([\w.]+)\":", r"\1:"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"\1"),
    (r"NoneType", "null"),
    (r"Does not validate against any of the Union subtypes", ""),
    (r"Type \S*Callable.* expects a function or a callable class: ", ""),
    (r".*Multiple subclasses with name (\w+).*", r"several classes are called \1: give the whole path of one"),
    (r".*the following arguments are required: (.*)", r"it needs \1"),
    (r"Import path (\S+ )?does not correspond to a subclass of (Source|VisionDataset)$", ""),  # either will do
    (r"Problem with given class_path '\S+':$", ""),
    (r"Expected '(\S+)' to be a subclass of ([\w |]+).*", r"\1 is no \2."),
    (r"Expected a path but (\S+) either not accessible or invalid.*", r"there is no class \1."),
    (r"\.? ?Got value: (Namespace|None).*", "."),
    (r"(Got value: \S+)\.$", r"\1"),
    (r"Expected a dot import path string: .*", ""),
    (r"Expected an? ", "expected "),
    (r"^Subtypes: .*|^Errors:.*|^Given value type: .*|^Given value: .*", ""),
)


def explain(error: ArgumentError, parser: ArgumentParser) -> ConfigError:
    """Say what is wrong with a flag or a config file.

    Args:
        error: What the parser raised.
        parser: The verb's parser, whose keys are known.
    """
    message = str(error)
    denied = DENIED.search(message)
    if denied:
        return ConfigError(refused(denied["path"]))
    elsewhere = ELSEWHERE.search(message)
    if elsewhere:
        return ConfigError(
            f"{elsewhere['place']} is no file here, and nothing is fetched. Download it, read it, and give its path."
        )
    found = UNKNOWN.search(message)
    return _unknown(found, parser) if found else ConfigError(_plain(message))


def _unknown(found: re.Match[str], parser: ArgumentParser) -> ConfigError:
    part = found.groupdict()
    if part["argument"]:
        word, place = part["argument"], f" in {part['part']} ({part['path']})"
        known = list(inspect.signature(resolve({"class_path": part["path"]}, object)).parameters)
        return ConfigError(f"unknown key {word!r}{place}. {nearest(word, known)}It takes {', '.join(known)}.")
    keys = [action.dest for action in parser._actions if action.dest != "help"]
    if part["flag"]:
        word = part["flag"]
        return ConfigError(f"unknown flag {word}. {nearest(word, [f'--{key}' for key in keys])}See --help for all.")
    word = ".".join(filter(None, (part["group"], part["key"])))
    sections = {key.partition(".")[0] for key in keys}
    section = word.partition(".")[0]
    if section not in sections:
        return ConfigError(f"unknown key {section!r}. {nearest(section, sections)}See --help for all.")
    return ConfigError(f"unknown key {word!r}. {nearest(word, keys)}See --help for all.")


def _plain(message: str) -> str:
    lines = []
    for line in message.splitlines():
        line = line.strip(" -")
        for pattern, plainer in PLAINER:
            line = re.sub(pattern, plainer, line).strip()
        if line:
            lines.append(line)
    others = [line for line in lines if not line.startswith("there is no class")]
    if any(line.startswith(("several classes", "expected '")) or " is no " in line for line in others):
        lines = others
    if any("it needs " in line for line in lines):  # as of a union's kinds it is the one that is meant
        lines = [line for line in lines if not line.startswith("expected ")]
    lines = [line for line in lines if not (line == "expected null" and len(lines) > 2)]
    message = LACKS.sub(r"\1: it needs \2. Say it with --\1.\2 VALUE", " ".join(dict.fromkeys(lines)))
    before, word, after = message.partition("expected ")
    return before + word + after.replace(" expected ", ", or ")  # the kinds of a union, each on a line of its own
