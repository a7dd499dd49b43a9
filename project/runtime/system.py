"""What this process may use of the machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory() -> int:
    """Bytes of shared memory that are free; 0 where there is none of a known place."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def cache_folder() -> Path:
    """Where this project keeps what can be made again: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frozen-backbone"


def peak_memory() -> int | None:
    """Most bytes that this process has had in memory so far; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
