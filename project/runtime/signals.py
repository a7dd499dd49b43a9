"""SIGTERM and SIGINT: stop immediately, or let a fit save first; exit with the signal's exit code."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from threading import Thread
from types import FrameType

#: Seconds in which a second SIGINT counts as a duplicate of the first: a terminal sends Ctrl-C to all processes of a
#: run, and the other ranks forward it.
DUPLICATE_SECONDS = 0.5


class Interrupted(BaseException):
    """Raised when SIGTERM or SIGINT stops the process. A BaseException, so that ``except Exception`` does not catch it.

    Args:
        number: Signal number.
        message: Message for the user.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """The shell's exit code for a signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class SignalHandler:
    """Raises :class:`Interrupted` on SIGTERM and SIGINT, or records the signal while handling is deferred.

    Args:
        parent: Process id to forward signals to instead of raising: the rank that started this one and stops it.

    Attributes:
        received: The first received signal; 0 for none.
        deferred: Whether to record signals instead of raising. The training loop then polls ``received``.
        message: Appended to the message of :class:`Interrupted`.
    """

    def __init__(self, parent: int | None = None) -> None:
        self.received = 0
        self.deferred = False
        self.message = ""
        self._parent = parent
        self._received_time = 0.0

    def __enter__(self) -> SignalHandler:
        self._previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers, replacing those that others have installed since."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self._received_time > DUPLICATE_SECONDS:
                os.write(2, b"\nStopped immediately.\n")
                os._exit(128 + number)  # also when a thread hangs
            return
        self.received, self._received_time = number, now
        name = signal.Signals(number).name
        if self.deferred:
            os.write(2, f"\n{name}: saving after this batch. Press Ctrl-C again to stop immediately.\n".encode())
        elif self._parent is not None:
            os.kill(self._parent, number)
        else:
            raise Interrupted(number, f"Stopped by {name}. {self.message}".strip())


def ignore_signals(worker: int) -> None:
    """Make a DataLoader worker ignore SIGINT, and SIGTERM from anyone but its parent; a ``worker_init_fn``.

    A terminal's Ctrl-C and a scheduler's SIGTERM reach all processes, but the parent still needs the current batch.

    Args:
        worker: Index of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_exit_on_sigterm_from, args=(parent.pid,), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
            os._exit(0)
