"""One-page help of a verb: data and model flags first, trainer flags by name only."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from project.runtime.lightning_cli import OptionHelp

#: Flag groups and their titles; flags without a group follow.
GROUPS = {"data": "Data", "model": "Model", "features": "Stored features", "dashboard": "Dashboard"}
TRAINER = "trainer"
#: Replacements for the help texts of Lightning's own flags.
SHORT_TEXTS = {
    "ckpt_path": "Checkpoint file, or last or best of the latest run on this data",
    "config": "YAML file of flags",
    "print_config": "Print the configuration and exit",
    "seed_everything": "Random seed",
}
FLAG_WIDTH = 28
MAX_WIDTH = 110
MAX_LINES = 2  # per flag


def requested_help(args: Sequence[str]) -> str | None:
    """The help that a command line asks for.

    Returns:
        GROUP for ``--GROUP.help``; an empty string for ``--help``; ``None`` for neither.
    """
    for arg in args:
        if arg in ("-h", "--help"):
            return ""
        match = re.fullmatch(r"--(\w+)\.help", arg)
        if match and (match[1] in GROUPS or match[1] == TRAINER):
            return match[1]
    return None


def short_help(verb: str, description: str, usage: str, options: Iterable[OptionHelp]) -> str:
    """Help with at most two lines per flag, and only the names of the trainer's flags."""
    shown = [
        option for option in options if not option.name.endswith(".help") and option.name not in (*GROUPS, TRAINER)
    ]
    sections = [f"usage: {usage.replace('VERB', verb)}", description]
    for group, title in GROUPS.items():
        sections.append(_section(title, _of_group(group, shown), MAX_LINES))
    ungrouped = [option for option in shown if "." not in option.name and option.help]
    sections.append(_section(verb.capitalize(), ungrouped, MAX_LINES))
    names = ", ".join(option.name.partition(".")[2] for option in _of_group(TRAINER, shown))
    wrapped = textwrap.fill(names, _width(), initial_indent="  ", subsequent_indent="  ")
    sections.append(f"Trainer: --trainer.NAME, passed to Lightning's Trainer\n{wrapped}")
    sections.append(
        "More: --trainer.help, --data.help and --model.help describe these flags in full;\n"
        "--model.optimizer.help CLASS lists the arguments of a class."
    )
    return "\n\n".join(section for section in sections if section)


def group_help(group: str, options: Iterable[OptionHelp]) -> str:
    """Full help of a group's flags."""
    return _section(GROUPS.get(group, "Trainer"), _of_group(group, options))


def _of_group(group: str, options: Iterable[OptionHelp]) -> list[OptionHelp]:
    return [option for option in options if option.name.startswith(f"{group}.")]


def _section(title: str, options: Sequence[OptionHelp], max_lines: int = 0) -> str:
    if not options:
        return ""
    return "\n".join([f"{title}:", *(_entry(option, max_lines) for option in options)])


def _entry(option: OptionHelp, max_lines: int) -> str:
    """Help of one flag; ``max_lines`` of 0 means no limit."""
    text = _plain(option.help)
    if max_lines:
        text = SHORT_TEXTS.get(option.name) or text.partition(". ")[0].rstrip(".")
    if option.default not in (None, "", "{}", "==SUPPRESS=="):
        text += f" [{option.default}]"
    width = _width() - FLAG_WIDTH - 4
    lines = textwrap.wrap(text, width) or [""]
    if max_lines and len(lines) > max_lines:
        rest = " ".join(lines[max_lines - 1 :])
        lines = [*lines[: max_lines - 1], textwrap.shorten(rest, width, placeholder=" ...")]
    flag = f"--{option.name}"
    first = f"  {flag:<{FLAG_WIDTH}}  {lines[0]}"
    return "\n".join([first, *(" " * (FLAG_WIDTH + 4) + line for line in lines[1:])])


def _plain(text: str) -> str:
    """Remove reStructuredText markup."""
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, MAX_WIDTH)
