"""Short messages for errors of the parser, of class instantiation and of Lightning."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Sequence

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from project.config.class_path import ClassSpec
from project.config.import_allowlist import import_refusal, is_importable
from project.errors import ConfigError, did_you_mean
from project.runtime.jsonargparse_internals import accepted_class_paths
from project.runtime.lightning_cli import option_names
from project.runtime.system import shared_memory

# --- messages of libraries

#: Out of memory, raised as another class than torch.OutOfMemoryError.
OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|CUDA error: out of memory|_STATUS_ALLOC_FAILED|unable to find an engine to execute"
)
#: DataLoader workers out of shared memory.
OUT_OF_SHARED_MEMORY = re.compile(
    "out of shared memory|unable to (?:open|mmap|write|resize|allocate).*(?:shared memory|/torch_)"
)
#: Lightning's EarlyStopping, at the end of an epoch.
EARLY_STOPPING_METRIC = re.compile(
    r"Early stopping conditioned on metric `(?P<metric>.*?)` which is not available.*following: (?P<known>.*)"
)
#: Lightning's SaveConfigCallback, if a logger writes into the folder of another run.
USED_FOLDER = re.compile(r"SaveConfigCallback expected (?P<path>.*) to NOT exist")
#: Lightning's ReduceLROnPlateau.
PLATEAU_METRIC = re.compile(
    r"ReduceLROnPlateau conditioned on metric (?P<metric>\S+) which is not available\. "
    r"Available metrics are: (?P<known>.*)"
)

#: Lightning's Trainer, for ``devices: 0`` and an empty list.
NO_DEVICES = re.compile(r"`Trainer\(devices=(?P<value>.*?)\)` value is not a valid input using (?P<accelerator>\w+)")
#: Lightning's checks of a Trainer argument, without its section.
TRAINER_ARGUMENT = re.compile(r"^`(?P<name>\w+)` must")

# --- messages of the parser, which list the errors of every member of a union type

#: An unknown flag, key of a config, or argument of a class.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: (?P<flag>--[\w.]+)"
    r"|(?:Group '(?P<group>[\w.]+)'|Parser|Subcommand '\w+') does not accept option '(?P<key>[\w.]+)'"
    r"|Parser key \"(?P<class_key>[\w.]+)\".*?Option '(?P<argument>[\w.]+)' is not accepted"
    r".*?class_path='(?P<path>[\w.]+)'",
    re.DOTALL,
)
#: An import that the allowlist denies.
IMPORT_DENIED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed, denied by")
#: A URL in the place of a config file.
URL = re.compile(
    r"(?:config|exist|import path\S*|accessible|format:?|class|path):? ['\"]?(?P<url>\w[\w.+:]*://[^\s'\"]*)"
)
#: The key of an invalid value.
PARSER_KEY = re.compile(r"Parser key \"(?P<key>[\w.]+)\":")
#: A class name that does not exist.
UNKNOWN_CLASS = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\".*?"
    r"(?:Expected a dot import path string: |has no attribute '\w+'\. Got value: )(?P<path>[\w.]+)",
    re.DOTALL,
)
#: A file, or other text, in the place of a class name; the parser quotes the content of a file.
NOT_A_CLASS_NAME = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\":.*?(?:Unexpected import path format|Config file loop detected)", re.DOTALL
)
#: A class without its required arguments; of a union, the member that the user meant.
MISSING_ARGUMENTS = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\".*?the following arguments are required: (?P<names>[\w, ]+)", re.DOTALL
)
#: The class without its arguments, where the parser names it.
INCOMPLETE_CLASS = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+the following arguments are required")
GIVEN_VALUE = re.compile(r"\n *Given value: (.*)")
#: A value of a wrong type.
WRONG_TYPE = re.compile(
    r"^ *(?:- )?Expected an? (?:<class ')?(?P<type>\w+)(?:'>)?(?:\. Got value: (?P<value>.*))?$", re.MULTILINE
)
#: Plain words for the types of values.
TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list such as [a, b]",
    "dict": "a mapping such as {a: b}",
    "NoneType": "null",
}
#: Where a value belongs that is not a class.
HINTS = {"data.source": "A folder or a table of images belongs to --data.root."}
#: Errors of union members that the user did not mean.
OTHER_MEMBERS = re.compile(
    r"expected |Not a valid subclass of|Subclass types expect one of:|a class path \(str\)|a dict w"
)
#: Replacements that turn the parser's lines into plain text.
REPLACEMENTS = (
    (r"Parser key \"([\w.]+)\":", r"\1:"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"\1"),
    (r"NoneType", "null"),
    (r"argument subcommand: invalid choice: ('.*?') \(choose from (.*)\)", r"unknown command \1. Use one of \2."),
    (
        r"expected \"subcommand\" to be one of .*",
        "no command given. Start with: python -m project fit --data.root photos/ (--help lists all commands).",
    ),
    (r"File does not exist: ('.*')", r"there is no file \1. Pass the path of a YAML file after -c."),
    (r"Does not validate against any of the Union subtypes", ""),
    (r"Type \S*Callable.* expects a function or a callable class: ", ""),
    (r".*Multiple subclasses with name (\w+).*", r"several classes are called \1: give the whole path of one"),
    (r"Import path (\S+ )?does not correspond to a subclass of (Source|VisionDataset)$", ""),  # either is accepted
    (r"Problem with given class_path '\S+':$", ""),
    (r"Expected '(\S+)' to be a subclass of ([\w |]+).*", r"\1 is not a \2."),
    (r"Expected a path but (.+) either not accessible or invalid.*", r"there is no class \1."),
    (r"\.? ?Got value: (Namespace|None).*", "."),
    (r"(Got value: \S+)\.$", r"\1"),
    (r"Expected a dot import path string: (.*)", r"there is no class \1."),
    (r"Expected an? ", "expected "),
    (r"\('cannot represent an object', <\w+\.\w+: ('\w+')>\)", r"its default \1 cannot be stored; set it explicitly."),
    (r"^Subtypes: .*|^Errors:.*|^Given value type: .*|^Given value: .*", ""),
)


def explain(error: ArgumentError, parser: ArgumentParser) -> ConfigError:
    """Explain an invalid flag or config file.

    Args:
        error: Exception of the parser.
        parser: Parser of the verb, for its keys.
    """
    message = str(error)
    if denied := IMPORT_DENIED.search(message):
        return ConfigError(import_refusal(denied["path"]))
    if url := URL.search(message):
        return ConfigError(f"{url['url']} is a URL, but only local files are accepted. Download it and pass its path.")
    if unknown := UNKNOWN_KEY.search(message):
        return _unknown_key(unknown, parser)
    if not_a_name := NOT_A_CLASS_NAME.search(message):
        key = not_a_name["key"]
        return ConfigError(
            f"{key}: expected the name of a class, not a file or other text. {HINTS.get(key, '')}".strip()
        )
    if missing := MISSING_ARGUMENTS.search(message):
        return _missing_arguments(missing, message)
    if wrong_type := _wrong_type(message):
        return wrong_type
    plain = _plain_text(message)
    unknown_class = UNKNOWN_CLASS.search(message) if "there is no class" in plain else None
    return _unknown_class(unknown_class["key"], unknown_class["path"], parser) if unknown_class else ConfigError(plain)


def _wrong_type(message: str) -> ConfigError | None:
    """Explain a value of a wrong type; ``None`` if the message has other errors."""
    key, matches = PARSER_KEY.search(message), [*WRONG_TYPE.finditer(message)]
    known = [match["type"] for match in matches if match["type"] in TYPES]
    others = len(re.findall(r"^ *- ", message, re.MULTILINE)) - len(matches)
    if key is None or not known or len(known) < len(matches) or others > 0:
        return None
    value = _given_value(message) or matches[-1]["value"]
    types = " or ".join(dict.fromkeys(TYPES[name] for name in known))
    return ConfigError(f"{key['key']}: expected {types}{f', not {value}' if value else ''}.")


def explain_instantiation(error: Exception) -> ConfigError:
    """Explain why a class that passed the parser cannot be instantiated.

    Args:
        error: Exception of the instantiation.
    """
    lines = _plain_lines(str(error))
    names = [path.rpartition(".")[2] for path in _class_paths(_given_value(str(error)))]
    reason = " ".join([line for line in lines if not OTHER_MEMBERS.match(line)] or lines)
    return ConfigError(f"{' or '.join(names)}: {reason}" if names else reason)


def explain_runtime_error(error: RuntimeError) -> str | None:
    """Explain a runtime error that the user can fix; ``None`` for others.

    Args:
        error: Exception of a library.
    """
    message = str(error)
    if OUT_OF_SHARED_MEMORY.search(message):
        return (
            f"DataLoader workers are out of shared memory (/dev/shm has {shared_memory() / 1e6:.0f} MB). "
            "Use --data.num_workers 0,\nor give the container more: docker run --shm-size 8g."
        )
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(message):
        return out_of_memory(message)
    if "Could not determine home directory" in message:
        return "Cannot expand ~user in a path: unknown user. Write the path in full."
    if match := USED_FOLDER.search(message):
        return f"{match['path']} is of an earlier run. Give trainer.logger another version or name, or none."
    if not (match := EARLY_STOPPING_METRIC.search(message)):
        return None
    return _unknown_metric("EarlyStopping", match["metric"], re.findall("`(.*?)`", match["known"]))


def explain_misconfiguration(error: MisconfigurationException) -> str:
    """Explain a setting that Lightning rejects.

    Args:
        error: Exception of Lightning.
    """
    message = str(error)
    if match := NO_DEVICES.search(message):
        return (
            f"trainer.devices: {match['value']} is no device of accelerator {match['accelerator']}. "
            "Use a positive number, or auto."
        )
    match = PLATEAU_METRIC.search(message)
    if match is None:
        return TRAINER_ARGUMENT.sub(r"trainer.\g<name> must", message)
    known = re.findall("'(.*?)'", match["known"])
    return _unknown_metric("model.scheduler: ReduceLROnPlateau", match["metric"], known)


def _unknown_metric(source: str, metric: str, known: Sequence[str]) -> str:
    names = ", ".join(name for name in known if "_of/" not in name)  # without the metrics of single classes
    return f"{source}: metric {metric!r} is not logged. {did_you_mean(metric, known)}Available: {names}."


def out_of_memory(message: str) -> str:
    """Explain an allocator's message, and name the flags that reduce memory."""
    requested = re.search(r"Tried to allocate ([\d.]+ \w+)|tried to allocate (\d+) bytes", message)
    size = "" if requested is None else f" for {requested[1] or f'{int(requested[2]) / 1e9:.3g} GB'} more"
    memory = "memory" if "DefaultCPUAllocator" in message else "GPU memory"
    return (
        f"Not enough {memory}{size}. Lower --data.batch_size (--trainer.accumulate_grad_batches compensates),\n"
        "lower --model.image_size, train fewer stages (--model.trainable), or use --trainer.precision bf16-mixed."
    )


def _unknown_key(match: re.Match[str], parser: ArgumentParser) -> ConfigError:
    if argument := match["argument"]:
        accepted = list(inspect.signature(ClassSpec(match["path"]).resolve(object)).parameters)
        return ConfigError(
            f"unknown key {argument!r} in {match['class_key']} ({match['path']}). "
            f"{did_you_mean(argument, accepted)}It takes {', '.join(accepted)}."
        )
    keys = [name for name in option_names(parser) if not name.endswith(".help")]
    if flag := match["flag"]:
        arguments = [f"--{name}" for name in _class_arguments(parser, keys)]
        same = [name for name in arguments if name.rpartition(".")[2] == flag.lstrip("-").rpartition(".")[2]]
        suggestion = f"Did you mean {same[0]!r}? " if same else did_you_mean(flag, [f"--{key}" for key in keys])
        return ConfigError(f"unknown flag {flag}. {suggestion}See --help for all.")
    key = ".".join(filter(None, (match["group"], match["key"])))
    sections = {name.partition(".")[0] for name in keys}
    section = key.partition(".")[0]
    if section not in sections:
        return ConfigError(f"unknown key {section!r}. {did_you_mean(section, sections)}See --help for all.")
    return ConfigError(f"unknown key {key!r}. {did_you_mean(key, keys)}See --help for all.")


def _class_arguments(parser: ArgumentParser, keys: Sequence[str]) -> list[str]:
    """Flags of the arguments of the default classes, such as ``model.optimizer.lr``, which the parser does not list."""
    names, defaults = [], parser.get_defaults(skip_validation=True)
    for key in keys:
        default = defaults.get(key)
        path = getattr(default, "class_path", None)
        if isinstance(path, str) and is_importable(path):
            names += [f"{key}.{name}" for name in inspect.signature(ClassSpec(path).resolve(object)).parameters]
    return names


def _unknown_class(key: str, path: str, parser: ArgumentParser) -> ConfigError:
    accepted = [known for known in accepted_class_paths(parser, key) if is_importable(known)]
    if "." not in path:
        accepted = [known.rpartition(".")[2] for known in accepted]
    suggestion = did_you_mean(path, dict.fromkeys(accepted))
    return ConfigError(f"{key}: there is no class {path}. {suggestion}{HINTS.get(key, '')}".strip())


def _missing_arguments(match: re.Match[str], message: str) -> ConfigError:
    key, arguments = match["key"], match["names"].split(", ")
    incomplete, value = INCOMPLETE_CLASS.search(message), _given_value(message)
    is_list, paths = value.startswith("["), _class_paths(value)
    path = incomplete["path"] if incomplete else "".join(paths[:1])
    name = path.rpartition(".")[2] or "it"
    # A flag sets an argument of the only class, or of the last in a list if the key also accepts a single class.
    flag_paths = paths[:1] if not is_list else paths[-1:] if "Not a valid subclass" in message else []
    if path in flag_paths:
        fix = "Set " + " ".join(f"--{key}.{argument} VALUE" for argument in arguments)
    else:
        init_args = ", ".join(f"{argument}: VALUE" for argument in arguments)
        fix = f"In a config: {{class_path: {name}, init_args: {{{init_args}}}}}"
    return ConfigError(f"{key}: {name} needs {', '.join(arguments)}. {fix}")


def _given_value(message: str) -> str:
    """The value of the key: the last one in the message, after those of the union's members."""
    return "".join(GIVEN_VALUE.findall(f"\n{message}")[-1:])


def _class_paths(value: str) -> list[str]:
    return re.findall(r"class_path='([\w.]+)'", value)


def _plain_lines(message: str) -> list[str]:
    lines = []
    for line in message.splitlines():
        line = line.strip(" -")
        for pattern, replacement in REPLACEMENTS:
            line = re.sub(pattern, replacement, line).strip()
        if line:
            lines.append(line)
    return list(dict.fromkeys(lines))


def _plain_text(message: str) -> str:
    lines = _plain_lines(message)
    others = [line for line in lines if not line.startswith("there is no class")]
    if any(line.startswith(("several classes", "expected '")) or " is not a " in line for line in others):
        lines = others
    lines = [line for line in lines if not (line == "expected null" and len(lines) > 2)]
    before, word, after = " ".join(lines).partition("expected ")
    return before + word + after.replace(" expected ", ", or ")  # one line per member of a union
