"""Errors of the parser, of parts and of Lightning, in one line that says which key, and what it could have been."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from project.config.class_path import ClassSpec
from project.config.import_allowlist import refused
from project.errors import ConfigError, nearest
from project.runtime.lightning_cli import option_names
from project.runtime.system import shared_memory

#: What libraries say that have no memory left and raise something else than torch.OutOfMemoryError.
OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator|CUDA error: out of memory|_STATUS_ALLOC_FAILED|unable to find an engine to execute"
)
#: What torch says where DataLoader workers have no shared memory left.
SHARED_MEMORY = re.compile(
    "out of shared memory|unable to (?:open|mmap|write|resize|allocate).*(?:shared memory|/torch_)"
)
#: What Lightning says of a schedule whose metric is not there.
PLATEAU = re.compile(
    r"ReduceLROnPlateau conditioned on metric (?P<metric>\S+) which is not available\. "
    r"Available metrics are: (?P<known>.*)"
)
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
#: A part that lacks arguments; of a union's kinds it is the one that is meant.
LACKS = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\".*?the following arguments are required: (?P<words>[\w, ]+)", re.DOTALL
)
#: Which part it is, where the parser says so, and what was given.
LACKING = re.compile(r"given class_path '(?P<path>[\w.]+)':\s+the following arguments are required")
GIVEN = re.compile(r"\n *Given value: (.*)")
#: What a union's kinds that were not meant say.
OF_OTHERS = re.compile(r"expected |Not a valid subclass of|Subclass types expect one of:|a class path \(str\)|a dict w")
#: Lightning's EarlyStopping, once an epoch is over.
UNWATCHED = re.compile(
    r"Early stopping conditioned on metric `(?P<metric>.*?)` which is not available.*following: (?P<known>.*)"
)
#: How the parser names types, and how people do.
PLAINER = (
    (r"Parser key \"([\w.]+)\":", r"\1:"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[([^\]]*)\]", r"\1"),
    (r"NoneType", "null"),
    (r"Does not validate against any of the Union subtypes", ""),
    (r"Type \S*Callable.* expects a function or a callable class: ", ""),
    (r".*Multiple subclasses with name (\w+).*", r"several classes are called \1: give the whole path of one"),
    (r"Import path (\S+ )?does not correspond to a subclass of (Source|VisionDataset)$", ""),  # either will do
    (r"Problem with given class_path '\S+':$", ""),
    (r"Expected '(\S+)' to be a subclass of ([\w |]+).*", r"\1 is no \2."),
    (r"Expected a path but (\S+) either not accessible or invalid.*", r"there is no class \1."),
    (r"\.? ?Got value: (Namespace|None).*", "."),
    (r"(Got value: \S+)\.$", r"\1"),
    (r"Expected a dot import path string: .*", ""),
    (r"Expected an? ", "expected "),
    (r"\('cannot represent an object', <\w+\.\w+: ('\w+')>\)", r"its default \1 cannot be kept; say it yourself."),
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
    if found := UNKNOWN.search(message):
        return _unknown(found, parser)
    lacks = LACKS.search(message)
    return _lacking(lacks, message) if lacks else ConfigError(_plain(message))


def explain_part(error: Exception) -> ConfigError:
    """Say why a part cannot be made of what the parser has let pass.

    Args:
        error: What was raised when it was made.
    """
    lines, parts = _plainer(str(error)), [path.rpartition(".")[2] for path in _parts(_given(str(error)))]
    meant = " ".join([line for line in lines if not OF_OTHERS.match(line)] or lines)
    return ConfigError(f"{' or '.join(parts)}: {meant}" if parts else meant)


def explain_runtime_error(error: RuntimeError) -> str | None:
    """Say what is wrong with a value that nobody could hold against anything before; ``None`` of other errors.

    Args:
        error: What a library raised.
    """
    message = str(error)
    if SHARED_MEMORY.search(message):
        return (
            f"The processes that load images are out of shared memory (/dev/shm has {shared_memory() / 1e6:.0f} MB). "
            "Use --data.num_workers 0,\nor give a container more of it: docker run --shm-size 8g."
        )
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(message):
        return out_of_memory(message)
    if "Could not determine home directory" in message:
        return "A path begins with ~ and the name of somebody who is not known here. Write it out."
    if not (found := UNWATCHED.search(message)):
        return None
    return _unwatched("EarlyStopping", found["metric"], re.findall("`(.*?)`", found["known"]))


def explain_misconfiguration(error: MisconfigurationException) -> str:
    """Say what Lightning refuses.

    Args:
        error: What Lightning raised.
    """
    found = PLATEAU.search(str(error))
    if found is None:
        return str(error)
    return _unwatched("model.scheduler: ReduceLROnPlateau", found["metric"], re.findall("'(.*?)'", found["known"]))


def _unwatched(what: str, metric: str, known: Sequence[str]) -> str:
    totals = ", ".join(name for name in known if "_of/" not in name)  # a class has three more
    return f"{what}: there is no {metric!r} to watch. {nearest(metric, known)}There are {totals}."


def out_of_memory(message: str) -> str:
    """What the allocator says first, and the flags that need less."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)|tried to allocate (\d+) bytes", message)
    size = "" if asked is None else f" for {asked[1] or f'{int(asked[2]) / 1e9:.3g} GB'} more"
    where = "memory" if "DefaultCPUAllocator" in message else "GPU memory"
    return (
        f"Not enough {where}{size}. Lower --data.batch_size (--trainer.accumulate_grad_batches makes up for it),\n"
        "lower --model.image_size, train fewer stages (--model.trainable), or use --trainer.precision bf16-mixed."
    )


def _unknown(found: re.Match[str], parser: ArgumentParser) -> ConfigError:
    part = found.groupdict()
    if part["argument"]:
        word, place = part["argument"], f" in {part['part']} ({part['path']})"
        known = list(inspect.signature(ClassSpec(part["path"]).resolve(object)).parameters)
        return ConfigError(f"unknown key {word!r}{place}. {nearest(word, known)}It takes {', '.join(known)}.")
    keys = option_names(parser)
    if part["flag"]:
        word = part["flag"]
        return ConfigError(f"unknown flag {word}. {nearest(word, [f'--{key}' for key in keys])}See --help for all.")
    word = ".".join(filter(None, (part["group"], part["key"])))
    sections = {key.partition(".")[0] for key in keys}
    section = word.partition(".")[0]
    if section not in sections:
        return ConfigError(f"unknown key {section!r}. {nearest(section, sections)}See --help for all.")
    return ConfigError(f"unknown key {word!r}. {nearest(word, keys)}See --help for all.")


def _lacking(found: re.Match[str], message: str) -> ConfigError:
    key, words = found["key"], found["words"].split(", ")
    lacking, given = LACKING.search(message), _given(message)
    listed, parts = given.startswith("["), _parts(given)
    path = lacking["path"] if lacking else "".join(parts[:1])
    name = path.rpartition(".")[2] or "it"
    # A flag is of the class, or of the last one, where the key takes a class and not in a list alone.
    flagged = parts[:1] if not listed else parts[-1:] if "Not a valid subclass" in message else []
    if path in flagged:
        mend = "Say it with " + " ".join(f"--{key}.{word} VALUE" for word in words)
    else:
        mend = f"In a config: {{class_path: {name}, init_args: {{{', '.join(f'{word}: VALUE' for word in words)}}}}}"
    return ConfigError(f"{key}: {name} needs {', '.join(words)}. {mend}")


def _given(message: str) -> str:
    """The whole value that was given; those of a union's kinds come before it."""
    return "".join(GIVEN.findall(f"\n{message}")[-1:])


def _parts(given: str) -> list[str]:
    return re.findall(r"class_path='([\w.]+)'", given)


def _plainer(message: str) -> list[str]:
    lines = []
    for line in message.splitlines():
        line = line.strip(" -")
        for pattern, plainer in PLAINER:
            line = re.sub(pattern, plainer, line).strip()
        if line:
            lines.append(line)
    return list(dict.fromkeys(lines))


def _plain(message: str) -> str:
    lines = _plainer(message)
    others = [line for line in lines if not line.startswith("there is no class")]
    if any(line.startswith(("several classes", "expected '")) or " is no " in line for line in others):
        lines = others
    lines = [line for line in lines if not (line == "expected null" and len(lines) > 2)]
    before, word, after = " ".join(lines).partition("expected ")
    return before + word + after.replace(" expected ", ", or ")  # the kinds of a union, each on a line of its own
