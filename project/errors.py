"""User errors. Each message says what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProjectError(Exception):
    """An error that the user can fix. The command line prints one or two lines, no traceback, and exits with code 2.

    Args:
        message: The message, or, if any of the fields below is given, a template of ``{path}``, ``{reason}`` and
            ``{hint}``.
        path: File, folder or configuration key.
        reason: What is wrong; the message by default.
        hint: How to fix it.

    Attributes:
        reported_elsewhere: Whether another rank reports this error, so that this one prints nothing.
    """

    reported_elsewhere = False

    def __init__(self, message: str, *, path: object = None, reason: object = None, hint: str = "") -> None:
        self.path = None if path is None else str(path)
        self.reason = message if reason is None else str(reason)
        self.hint = hint
        has_fields = path is not None or reason is not None or hint
        text = message.format(path=self.path, reason=self.reason, hint=hint) if has_fields else message
        super().__init__(text.rstrip())  # a suggestion ends with a space


class ConfigError(ProjectError):
    """Invalid flag or configuration key."""


class DataError(ProjectError):
    """Invalid images or data folders."""


class ModelError(ProjectError):
    """Invalid backbone or head."""


class WeightsError(ProjectError):
    """Missing, damaged or incompatible weights file."""


class CheckpointError(ProjectError):
    """Missing, damaged or incompatible checkpoint."""


class EngineError(ProjectError):
    """An engine cannot run the network on this machine."""


class StoreError(ProjectError):
    """The feature store cannot be read or written."""


class FrozenError(ProjectError):
    """A frozen parameter or buffer has changed."""


def damaged_checkpoint(reason: str) -> CheckpointError:
    """Make the error for a damaged checkpoint.

    Args:
        reason: A sentence that names the checkpoint and what is wrong with it.
    """
    return CheckpointError(
        "{reason}\n{hint}",
        reason=" ".join(reason.splitlines()),
        hint="Use another checkpoint of the run (best.ckpt or last.ckpt), or retrain.",
    )


def abbreviate(value: object, max_length: int = 80) -> str:
    """The ``repr`` of a value on one line, truncated."""
    return " ".join(repr(value).split())[:max_length]


def join_names(names: Iterable[str], limit: int = 5) -> str:
    """Join the first ``limit`` names, and append the number of further ones, for a message."""
    names = [*names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest up to three known names that are similar to a misspelled one, ignoring case.

    Returns:
        ``"Did you mean 'a', 'b' or 'c'? "``, or an empty string if no name is similar.
    """

    def similarity(name: str) -> tuple[float, bool, str]:
        ratio = difflib.SequenceMatcher(None, name.lower(), word.lower()).ratio()
        return ratio, name[:1].lower() == word[:1].lower(), name

    scores = sorted(map(similarity, known), reverse=True)
    matches = [repr(name) for ratio, _, name in scores if ratio >= 0.6][:3]
    if not matches:
        return ""
    return f"Did you mean {' or '.join(filter(None, [', '.join(matches[:-1]), matches[-1]]))}? "
