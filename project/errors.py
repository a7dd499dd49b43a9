"""The mistakes that people make, each with what went wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProjectError(Exception):
    """A mistake that the user can mend: shown as one or two lines, exit code 2, no traceback.

    Args:
        message: What, where, and how to mend it.

    Attributes:
        told: Whether another process of a distributed run says it, so that this one need not.
    """

    told = False

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises again in the main process, with the worker's whole traceback as the message:
        # only what was said at its end is for people.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


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


def damaged(what: str) -> CheckpointError:
    """Say that a checkpoint is not as a fit wrote it.

    Args:
        what: Which checkpoint, and what is wrong with it, in a sentence.
    """
    return CheckpointError(
        f"{' '.join(what.splitlines())}\nTake another one of its run, best.ckpt or last.ckpt, or fit anew."
    )


def shown(value: object, most: int = 80) -> str:
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
