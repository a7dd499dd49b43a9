"""The machine: cores, memory, cache folder, installed packages. All platform-specific system calls are here."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

#: Bytes of memory to assume where the system does not report it.
DEFAULT_MEMORY = 8 * 2**30
#: Packages whose versions model cards and error reports contain.
REPORTED_PACKAGES = ("frozen-backbone", "torch", "torchvision", "lightning", "torchmetrics", "timm", "pillow")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by package name; packages that are not installed are omitted."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory() -> int:
    """Free bytes in /dev/shm; 0 where it does not exist."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def cache_folder() -> Path:
    """This project's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frozen-backbone"


def peak_memory() -> int | None:
    """Peak memory of this process, in bytes; ``None`` where the system does not report it."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory available to this process: the machine's memory, or the container's limit if that is lower.

    Args:
        root: Folder that contains ``proc`` and ``sys``; tests use another one.
    """
    return min([_physical_memory(), *_cgroup_limits(root)])


def _physical_memory() -> int:
    if not hasattr(os, "sysconf"):  # on Windows
        return DEFAULT_MEMORY
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Memory limits of this process's control group and its parents (cgroup v1 and v2).

    In a container the group's path may be the host's, so the root of the mount is read too.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            file = folder / name
            text = file.read_text().strip() if file.is_file() else "max"
            if text != "max":
                yield int(text)


def read_at(file: int, target: memoryview, offset: int) -> int:
    """Read from an offset of an open file, independent of the file's position.

    Args:
        file: File descriptor.
        target: Buffer to fill.
        offset: Offset in bytes.

    Returns:
        Number of bytes read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows: not safe with concurrent readers of one descriptor
    content = os.read(file, len(target))
    target[: len(content)] = content
    return len(content)
