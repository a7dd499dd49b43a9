"""What an exception means to the user: a line or two, and the exit code."""

from __future__ import annotations

import errno
import platform
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException

from project.cli.parser_errors import explain_misconfiguration, explain_runtime_error, out_of_memory
from project.errors import ProjectError
from project.runtime.distributed import is_peer_failure
from project.runtime.system import cache_folder

MISTAKE, PEER, INTERNAL, BROKEN_PIPE = 2, 1, 70, 141
LIBRARIES = ("frozen-backbone", "torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "timm", "pillow")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def describe(error: Exception, args: Sequence[str]) -> tuple[str, int]:
    """Say what has ended a command.

    Args:
        error: What was raised.
        args: The command line.

    Returns:
        The message, empty where another process reports it; and the exit code: 2 after what the user can mend, 1 where
        another process has failed, 70 after an error of this project's own.
    """
    if isinstance(error, ProjectError):
        return "" if error.reported_elsewhere else f"error: {error}", MISTAKE
    if isinstance(error, MisconfigurationException):
        return f"error: {explain_misconfiguration(error)}", MISTAKE
    if isinstance(error, OSError) and error.errno in FULL:
        return f"error: {error}. What was saved before is whole.", MISTAKE
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"error: {out_of_memory('DefaultCPUAllocator')}", MISTAKE
    if isinstance(error, RuntimeError):
        said = explain_runtime_error(error)
        if said:
            return f"error: {said}", MISTAKE
        if is_peer_failure(error):
            return "error: another process of this run has ended, and said why; so this one ends too.", PEER
    if isinstance(error, (ValueError, TypeError, RuntimeError)) and _raised_by_lightning(error):
        return f"error: {' '.join(str(error).split())}", MISTAKE
    what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return f"internal error: {what}\nPlease report it with this file: {_report(error, args)}", INTERNAL


def _raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning has refused a flag."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(lightning.__file__).parent)


def _report(error: Exception, args: Sequence[str]) -> Path:
    """Write the traceback, the command line and the versions to a file."""
    lines = [f"python -m project {' '.join(args)}", f"{platform.platform()}, Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    text = "\n".join([*lines, "", *traceback.format_exception(error)])
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}.txt"
    for folder in (cache_folder() / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8", "backslashreplace")
            return folder / name
        except OSError:
            continue
    raise error  # nothing can be written: then the traceback itself
