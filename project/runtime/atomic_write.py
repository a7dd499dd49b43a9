"""Files that appear whole, under their names, or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: How the names of files begin that are being written, or were when their writer was killed.
TEMPORARY = ".writing-"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside the target, which takes its place once it is whole and on the disk.

    Whenever the process is killed, and whatever fails, the target is what it was or what it is to be.

    Args:
        target: The file that is to be there; its folder is made.

    Yields:
        The path to write to; it keeps the target's suffix.

    Raises:
        OSError: The folder cannot be written, or its disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with appearing(target.parent, lambda _: target.name, target.suffix) as temporary:
        yield temporary


@contextmanager
def appearing(folder: Path, named: Callable[[Path], str], suffix: str = "") -> Iterator[Path]:
    """A temporary file in a folder, which takes its name once it is whole and on the disk.

    Args:
        folder: Where.
        named: Gives its name, once it is written.
        suffix: Of the temporary file.

    Yields:
        The path to write to.

    Raises:
        OSError: The folder cannot be written, or its disk is full.
    """
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}{suffix}"
    # With the permissions that the user's umask gives, which tempfile's would not have: folders are shared.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(folder / named(temporary))
        _sync(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot flush a folder; a file they all can.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(handle)
