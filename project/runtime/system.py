"""What this process may use of the machine: cores, memory, folders. System calls of one platform are here alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

#: Bytes of memory to assume where the system does not say how much there is.
ASSUMED_MEMORY = 8 * 2**30


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


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: those of the machine, or fewer where its container has a limit.

    Args:
        root: Folder under which ``proc`` and ``sys`` are; another one in tests.
    """
    return min([_physical_memory(), *_cgroup_limits(root)])


def _physical_memory() -> int:
    if not hasattr(os, "sysconf"):  # on Windows
        return ASSUMED_MEMORY
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of this process's control group and of those above it, of version 1 and 2.

    In a container the group's path may be that of the host, so the top of the mount is looked at too.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        here = mount / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(mount):
                break
            file = folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max":
                yield int(text)


def read_at(file: int, target: memoryview, offset: int) -> int:
    """Read from a place of an open file, whatever the file's own position; returns how many bytes were read.

    Args:
        file: Descriptor of the file.
        target: Where the bytes go; as many are read as it holds.
        offset: Where to begin.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], offset)
    os.lseek(file, offset, os.SEEK_SET)  # on Windows: no two threads may read one file at once
    content = os.read(file, len(target))
    target[: len(content)] = content
    return len(content)
