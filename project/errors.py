"""The mistakes that people make, each with what went wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProjectError(Exception):
    """A mistake that the user can fix: shown as one or two lines, exit code 2, no traceback.

    Args:
        message: What is wrong, where, and how to fix it. If fields are given, it is a template of ``{path}``,
            ``{reason}`` and ``{hint}``.
        path: The file, folder or key that it concerns.
        reason: What is wrong with that; by default the message.
        hint: How to fix it.

    Attributes:
        reported_elsewhere: Whether another process of a distributed run reports it, so that this one need not.
    """

    reported_elsewhere = False

    def __init__(self, message: str, *, path: object = None, reason: object = None, hint: str = "") -> None:
        self.path = None if path is None else str(path)
        self.reason = message if reason is None else str(reason)
        self.hint = hint
        has_fields = path is not None or reason is not None or hint
        super().__init__(message.format(path=self.path, reason=self.reason, hint=hint) if has_fields else message)


class ConfigError(ProjectError):
    """A flag or a key of the configuration is wrong."""


class DataError(ProjectError):
    """The images or their folders are wrong."""


class ModelError(ProjectError):
    """The backbone or the head is wrong."""


class WeightsError(ProjectError):
    """A file of weights is missing, altered, or of another network."""


class CheckpointError(ProjectError):
    """A checkpoint is missing, altered, or of another model."""


class EngineError(ProjectError):
    """An engine cannot compute this network on this machine."""


class StoreError(ProjectError):
    """Stored features cannot be kept or read where they should be."""


class FrozenError(ProjectError):
    """A part that was to stay frozen has changed."""


def damaged_checkpoint(what: str) -> CheckpointError:
    """Say that a checkpoint is not as a fit wrote it.

    Args:
        what: Which checkpoint, and what is wrong with it, in a sentence.
    """
    return CheckpointError(
        "{reason}\n{hint}",
        reason=" ".join(what.splitlines()),
        hint="Take another one of its run, best.ckpt or last.ckpt, or fit anew.",
    )


def abbreviate(value: object, most: int = 80) -> str:
    """A value in one line of so many characters at most: a tensor has several, and a checkpoint may hold any."""
    return " ".join(repr(value).split())[:most]


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known names come nearest to a misspelt one.

    Args:
        word: What was written.
        known: The names that would have been right.

    Returns:
        ``"Did you mean 'a', 'b' or 'c'? "``, or an empty string where nothing is near.
    """
    near = [repr(match) for match in difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)]
    if not near:
        return ""
    return f"Did you mean {' or '.join(filter(None, [', '.join(near[:-1]), near[-1]]))}? "
