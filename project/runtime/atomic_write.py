"""Atomic file writes: a file appears complete under its name, or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Prefix of temporary files: those being written, and those left by a killed process.
TEMPORARY_PREFIX = ".writing-"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Write to a temporary file beside the target; on exit, fsync it and rename it to the target.

    If the process is killed or the write fails, the target keeps its old content.

    Args:
        target: File to create or replace. Missing parent folders are created.

    Yields:
        Path to write to, with the target's suffix.

    Raises:
        OSError: The folder is not writable, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write_as(target.parent, lambda _: target.name, target.suffix) as temporary:
        yield temporary


@contextmanager
def atomic_write_as(folder: Path, make_name: Callable[[Path], str], suffix: str = "") -> Iterator[Path]:
    """Like :func:`atomic_write`, for a file whose name is known only after it is written, such as a hash.

    Args:
        folder: Existing folder of the file.
        make_name: Returns the final name; called with the path of the complete temporary file.
        suffix: Suffix of the temporary file.

    Yields:
        Path to write to.

    Raises:
        OSError: The folder is not writable, or the disk is full.
    """
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{suffix}"
    # tempfile would ignore the umask and create a file of mode 600, which others could not read in a shared folder.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(folder / make_name(temporary))
        _fsync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(target: Path) -> None:
    """Check that :func:`atomic_write` can create a file, and create its missing parent folders.

    Raises:
        OSError: The folder is not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=target.parent, prefix=TEMPORARY_PREFIX).close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems support fsync for files but not for folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)
