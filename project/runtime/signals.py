"""What a process does when it is asked to stop: finish and save what it can, then leave with the signal's exit code."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from threading import Thread
from types import FrameType

#: Seconds in which a second Ctrl-C is the first one's echo: a terminal sends it to all processes, which pass it on.
ECHO = 0.5


class Interrupted(BaseException):
    """The process was asked to stop. Not an Exception, so that nothing on the way takes it for a failure.

    Args:
        number: The signal: SIGTERM or SIGINT.
        message: What to print for the user.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.number


class SignalHandler:
    """SIGTERM and SIGINT raise :class:`Interrupted` at once, or, while somebody looks out for them, are kept for him.

    Args:
        parent: Process that a signal is passed on to, in place of being raised: it has started this one, and ends it.

    Attributes:
        received: The first signal that was received; 0 for none.
        awaited: Whether somebody looks at ``received`` from time to time, so that nothing has to be raised.
        meanwhile: What there is to say to the user where it is raised.
    """

    def __init__(self, parent: int | None = None) -> None:
        self.received = 0
        self.awaited = False
        self.meanwhile = ""
        self._parent = parent
        self._at = 0.0

    def __enter__(self) -> SignalHandler:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the place of the handlers that are there."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self._at > ECHO:
                os.write(2, b"\nStopped at once.\n")
                os._exit(128 + number)  # whatever hangs
            return
        self.received, self._at = number, now
        if self.awaited:
            os.write(2, f"\n{signal.Signals(number).name}: saving after this batch. Ctrl-C: stop at once.\n".encode())
        elif self._parent is not None:
            os.kill(self._parent, number)
        else:
            raise Interrupted(number, f"Stopped by {signal.Signals(number).name}. {self.meanwhile}".strip())


def ignore_signals(worker: int) -> None:
    """Have a process that loads images end when its parent says so, and at no other signal; a ``worker_init_fn``.

    A terminal's Ctrl-C and a scheduler's SIGTERM go to all processes, and the parent needs the batch that it is at.

    Args:
        worker: Number of the process among the loader's.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
            os._exit(0)
