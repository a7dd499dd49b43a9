"""Error message and exit code for each kind of exception."""

from __future__ import annotations

import errno
import platform
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException

from project.cli.parser_errors import explain_misconfiguration, explain_runtime_error, out_of_memory
from project.errors import ProjectError
from project.runtime.distributed import is_peer_failure
from project.runtime.system import REPORTED_PACKAGES, cache_folder, installed_versions

USER_ERROR, PEER_FAILURE, INTERNAL_ERROR, BROKEN_PIPE = 2, 1, 70, 141
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def describe(error: Exception, args: Sequence[str]) -> tuple[str, int]:
    """Describe the exception that ended a command.

    Args:
        error: The exception.
        args: The command line.

    Returns:
        The message, empty if another rank reports it, and the exit code: 2 for a user error, 1 if another rank failed,
        70 for an internal error.
    """
    if isinstance(error, ProjectError):
        return "" if error.reported_elsewhere else f"error: {error}", USER_ERROR
    if isinstance(error, MisconfigurationException):
        return f"error: {explain_misconfiguration(error)}", USER_ERROR
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"error: {place}{error.strerror}. Files that were already saved are intact.", USER_ERROR
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return f"error: {out_of_memory('DefaultCPUAllocator')}", USER_ERROR
    if isinstance(error, RuntimeError):
        explanation = explain_runtime_error(error)
        if explanation:
            return f"error: {explanation}", USER_ERROR
        if is_peer_failure(error):
            return "error: Another rank failed (see its message); shutting down.", PEER_FAILURE
    if isinstance(error, (ValueError, TypeError, RuntimeError)) and _raised_by_lightning(error):
        return f"error: {' '.join(str(error).split())}", USER_ERROR
    summary = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return f"internal error: {summary}\nPlease report it with this file: {_write_report(error, args)}", INTERNAL_ERROR


def _raised_by_lightning(error: Exception) -> bool:
    """Whether Lightning raised the error, which means that it rejects a setting."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(lightning.__file__).parent)


def _write_report(error: Exception, args: Sequence[str]) -> Path:
    """Write the command line, versions and traceback to a file."""
    lines = [f"python -m project {' '.join(args)}", f"{platform.platform()}, Python {platform.python_version()}"]
    packages = (*REPORTED_PACKAGES, "jsonargparse")
    versions = installed_versions(packages)
    lines += [f"{name} {versions.get(name, 'is not installed')}" for name in packages]
    text = "\n".join([*lines, "", *traceback.format_exception(error)])
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}.txt"
    for folder in (cache_folder() / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8", "backslashreplace")
            return folder / name
        except OSError:
            continue
    raise error  # no writable folder: show the traceback instead
