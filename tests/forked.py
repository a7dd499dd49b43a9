"""The command line in processes of their own, which have what it imports already and begin at once."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from project.classifier import ImageClassifier
from project.cli.main import main
from project.data.sources.files import Files

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked"])


@dataclass
class Run:
    """A command line that runs, or has run."""

    process: BaseProcess
    log: Path

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; negative after a signal that it did not answer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()  # or the tests would wait for it at their end
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self.log.read_text()

    def await_text(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed something."""
        until = time.monotonic() + seconds
        while text not in self.said:
            assert self.process.is_alive() and time.monotonic() < until, f"it never said {text!r}: {self.said}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start(folder: Path, arguments: Sequence[str], at: dict[str, Any] | None = None) -> Run:
    """Start a command line.

    Args:
        folder: Its working directory; what it prints goes to ``log.txt`` there.
        arguments: After ``python -m project``.
        at: Where it sends itself the signal ``number``: in the ``step`` of that number, or, if it ``validates``, in the
            validation after so many; or when it ``reads`` the image of that number.
    """
    log = folder / "log.txt"
    log.write_text("")
    cache = os.environ["XDG_CACHE_HOME"]
    process = CONTEXT.Process(target=_child, args=(str(folder), str(log), cache, list(arguments), at))
    process.start()
    return Run(process, log)


def _child(folder: str, log: str, cache: str, arguments: list[str], at: dict[str, Any] | None) -> None:
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = cache
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of what it starts in its turn, as in any other process
    if at is not None:
        _signal_itself(**at)
    sys.exit(main(arguments))


def _signal_itself(
    step: int | None = None, number: int = signal.SIGKILL, validates: bool = False, reads: int | None = None
) -> None:
    """In the middle of the work on a batch, of training or the first of validation after it; or on an image."""
    if reads is not None:
        left = itertools.count(reads, -1)
        _before(Files, "content", lambda *_: next(left) == 0, number)
    else:

        def now(model: Any, *_: Any) -> bool:
            return bool(model.trainer.global_step == step and not model.trainer.sanity_checking)

        _before(ImageClassifier, "validation_step" if validates else "training_step", now, number)


def _before(kind: type, name: str, now: Callable[..., bool], number: int) -> None:
    original = getattr(kind, name)

    def interrupted(*arguments: Any) -> Any:
        if now(*arguments):
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(kind, name, interrupted)
