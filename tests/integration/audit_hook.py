"""Record side effects of this process with Python's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Prefix of test modules that only a malicious file would import.
MARKER = "evil_marker"
#: Prefixes of events that start programs, use the network or load shared libraries.
EXTERNAL_EVENTS = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.kill", "pty.")
EXTERNAL_EVENTS += (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "urllib.",
    "http.",
    "ftplib.",
    "ctypes.dlopen",
)
FILE_EVENTS = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
#: Expected events: Lightning counts GPUs, and jsonargparse's stub reader asks Python for its path.
EXPECTED = ("libnvidia-ml", "import sys, json; print(json.dumps(sys.path))")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_events: list[str] | None = None  # None while not recording; an audit hook cannot be removed
_writable: tuple[str, ...] = ()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    if event == "import":
        if str(arguments[0]).startswith(MARKER):
            _events.append(f"import {arguments[0]}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and not _is_writable(path):
            _events.append(f"open {path} to write")
    elif event.startswith(FILE_EVENTS):
        if not _is_writable(arguments[0]):
            _events.append(f"{event} {arguments[0]}")
    elif event.startswith(EXTERNAL_EVENTS) and not any(text in str(arguments) for text in EXPECTED):
        _events.append(f"{event} {arguments}")


def _is_writable(path: Any) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str):  # an open file descriptor
        return True
    absolute = str(Path(path).absolute())
    return absolute == os.devnull or "__pycache__" in absolute or absolute.startswith(_writable)


@contextmanager
def record_side_effects(*writable: Path) -> Iterator[list[str]]:
    """Record side effects of this process.

    Args:
        writable: Folders in which writing is allowed.

    Yields:
        A list to which a line is added for each import of a marker module, written or removed file, started program,
        and network access.
    """
    global _events, _writable
    if not getattr(sys, "_has_audit_hook", False):
        sys.addaudithook(_hook)
        sys._has_audit_hook = True  # type: ignore[attr-defined]
    events: list[str] = []
    _events, _writable = events, tuple(str(folder) for folder in writable)
    try:
        yield events
    finally:
        _events = None
