"""What a process does when it is asked to stop: finish and save what it can, then leave with the signal's exit code."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

#: Seconds in which a second Ctrl-C is the first one's echo: a terminal sends it to all processes, which pass it on.
ECHO = 0.5


class Interrupted(BaseException):
    """The process was asked to stop. Not an Exception, so that nothing on the way takes it for a failure.

    Args:
        number: The signal: SIGTERM or SIGINT.
        told: What there is to say to the user.
    """

    def __init__(self, number: int, told: str = "") -> None:
        super().__init__(told)
        self.number = number
        self.told = told or f"Stopped by {signal.Signals(number).name}."

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that a signal ended: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.number


class Signals:
    """SIGTERM and SIGINT raise :class:`Interrupted` at once, or, while somebody looks out for them, are kept for him.

    Attributes:
        received: The signal that was received and not yet raised; 0 for none.
        awaited: Whether somebody looks at ``received`` from time to time, so that nothing has to be raised.
        parent: Process that a signal is passed on to, in place of being raised: the one that has started this one, and
            ends it.
    """

    def __init__(self) -> None:
        self.received = 0
        self.awaited = False
        self.parent: int | None = None
        self._at = 0.0

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
        elif self.parent is not None:
            os.kill(self.parent, number)
        else:
            raise Interrupted(number)
