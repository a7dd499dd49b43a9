"""The help of a verb on a page: data and model first, and the trainer's flags by name."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from project.runtime.lightning_cli import OptionHelp

#: Groups of flags with a title each; what has no group comes after them.
GROUPS = {
    "data": "Data",
    "model": "Model",
    "features": "Stored features",
    "dashboard": "Dashboard",
}
TRAINER = "trainer"
#: Of flags whose own help is Lightning's.
SHORTER = {
    "ckpt_path": "Checkpoint: a file, or last or best of the runs on this data",
    "config": "YAML file of flags",
    "print_config": "Print the configuration and exit",
    "seed_everything": "Seed of all that is random",
}
FLAG = 28  # columns of a flag's name
WIDEST = 110
LINES = 2  # of a flag, at most


def requested_help(args: Sequence[str]) -> str | None:
    """Which help a command line asks for.

    Returns:
        The group of ``--GROUP.help``; an empty string for ``--help``; ``None`` where no help is asked for.
    """
    for word in args:
        if word in ("-h", "--help"):
            return ""
        group = re.fullmatch(r"--(\w+)\.help", word)
        if group and (group[1] in GROUPS or group[1] == TRAINER):
            return group[1]
    return None


def short_help(verb: str, description: str, usage: str, options: Iterable[OptionHelp]) -> str:
    """A line or two for each flag of a verb; of the trainer's the names alone."""
    known = [each for each in options if not each.name.endswith(".help") and each.name not in (*GROUPS, TRAINER)]
    parts = [f"usage: {usage.replace('VERB', verb)}", description]
    for group, title in GROUPS.items():
        parts.append(_section(title, [each for each in known if each.name.startswith(f"{group}.")], LINES))
    parts.append(
        _section(f"{verb.capitalize()}", [each for each in known if "." not in each.name and each.help], LINES)
    )
    names = [each.name.partition(".")[2] for each in known if each.name.startswith(f"{TRAINER}.")]
    listed = textwrap.fill(", ".join(names), _width(), initial_indent="  ", subsequent_indent="  ")
    parts.append(f"Trainer: --trainer.NAME, of Lightning's Trainer\n{listed}")
    parts.append(
        "More: --trainer.help, --data.help or --model.help say all about these flags;\n"
        "--model.optimizer.help CLASS lists the arguments of a class."
    )
    return "\n\n".join(part for part in parts if part)


def group_help(group: str, options: Iterable[OptionHelp]) -> str:
    """All that is known of the flags of a group."""
    return _section(GROUPS.get(group, "Trainer"), [each for each in options if each.name.startswith(f"{group}.")], 0)


def _section(title: str, options: Sequence[OptionHelp], lines: int) -> str:
    if not options:
        return ""
    return "\n".join([f"{title}:", *(_entry(option, lines) for option in options)])


def _entry(option: OptionHelp, lines: int) -> str:
    text = _plain(option.help)
    if lines:
        text = SHORTER.get(option.name) or text.partition(". ")[0].rstrip(".")
    if option.default not in (None, "", "{}", "==SUPPRESS=="):
        text += f" [{option.default}]"
    found = textwrap.wrap(text, _width() - FLAG - 4) or [""]
    if lines and len(found) > lines:
        found = [
            *found[: lines - 1],
            textwrap.shorten(" ".join(found[lines - 1 :]), _width() - FLAG - 4, placeholder=" ..."),
        ]
    flag = f"--{option.name}"
    first = f"  {flag:<{FLAG}}  {found[0]}" if len(flag) <= FLAG else f"  {flag}  {found[0]}"
    return "\n".join([first, *(" " * (FLAG + 4) + line for line in found[1:])])


def _plain(text: str) -> str:
    """Without the marks of reStructuredText."""
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)
