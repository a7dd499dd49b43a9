"""The command line in processes of their own, which have what it imports already and begin at once."""

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

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["project.cli", "tests.processes"])

#: What is called with each batch, before it is trained on: with the number of the step, and whether it is validation.
Hook = Callable[[int, bool], None]


@dataclass
class Run:
    """A command line that runs, or has run."""

    process: BaseProcess
    log: Path

    def wait(self, seconds: float = 60) -> int:
        """Its exit code; negative after a signal that it did not answer."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.said}"
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
        at: ``step`` and, for a batch of validation, ``validates``: where it sends itself the signal ``number``.
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
    import torch

    from project.classifier import ImageClassifier
    from project.cli import main

    torch.set_num_threads(1)
    if at is not None:
        _signal_itself(ImageClassifier, **at)
    sys.exit(main(arguments))


def _signal_itself(kind: Any, step: int, number: int = signal.SIGKILL, validates: bool = False) -> None:
    """In the middle of the work on a batch: of training, or the first of validation after that many steps."""
    name = "validation_step" if validates else "training_step"
    original = getattr(kind, name)

    def interrupted(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == step and not self.trainer.sanity_checking:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    setattr(kind, name, interrupted)
