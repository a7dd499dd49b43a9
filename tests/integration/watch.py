"""What this process does to the world while it is watched, by Python's own audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Modules of the tests' own that no one but a stranger's file would import.
MARKER = "evil_marker"
#: Programs, the network, and libraries of machine code: the events by their beginnings.
REACHES_OUT = ("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty.", "socket.connect")
REACHES_OUT += ("socket.getaddrinfo", "socket.gethostby", "urllib.", "http.", "ftplib.", "ctypes.dlopen", "os.kill")
CHANGES_FILES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
#: What our own libraries do: Lightning counts GPUs; the parser's reader of stubs asks Python for its path.
OWN = ("libnvidia-ml", "import sys, json; print(json.dumps(sys.path))")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_seen: list[str] | None = None  # None while nobody watches: a hook cannot be taken away again
_legitimate: tuple[str, ...] = ()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "import":
        if str(arguments[0]).startswith(MARKER):
            _seen.append(f"import {arguments[0]}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and not _is_legitimate(path):
            _seen.append(f"open {path} to write")
    elif event.startswith(CHANGES_FILES):
        if not _is_legitimate(arguments[0]):
            _seen.append(f"{event} {arguments[0]}")
    elif event.startswith(REACHES_OUT) and not any(own in str(arguments) for own in OWN):
        _seen.append(f"{event} {arguments}")


def _is_legitimate(path: Any) -> bool:
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str):  # a descriptor that is open already
        return True
    normal = str(Path(path).absolute())
    return normal == os.devnull or "__pycache__" in normal or normal.startswith(_legitimate)


@contextmanager
def watched(*legitimate: Path) -> Iterator[list[str]]:
    """Watch this process.

    Args:
        legitimate: Folders in which it may write.

    Yields:
        A list that grows by a line for each import of the marker module, file written or removed, program started,
        and name looked up or connection made on the network.
    """
    global _seen, _legitimate
    if not getattr(sys, "_is_watched", False):
        sys.addaudithook(_hook)
        sys._is_watched = True  # type: ignore[attr-defined]
    seen: list[str] = []
    _seen, _legitimate = seen, tuple(str(folder) for folder in legitimate)
    try:
        yield seen
    finally:
        _seen = None
