"""Connections of the server: their clients have limited time to send the headers of a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """Closes a connection that sends no complete headers in time after it was opened or after a response.

    Without it, a client could keep any number of connections open, each of which takes a file descriptor: uvicorn's
    timeout only applies to clients that send nothing at all after a response. The rest of a refused upload must arrive
    in the same time. The time of a request from its headers to its answer is limited elsewhere.

    Args:
        seconds: Longest time.
        options: Arguments of the base class.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in the base class
        """Start to wait for a request."""
        super().connection_made(transport)
        self._start_timer()

    def on_response_complete(self) -> None:
        """Start to wait for the next request."""
        self._start_timer()
        super().on_response_complete()  # handles the next request if it has arrived already

    def handle_events(self) -> None:
        """Stop waiting if the headers are complete."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_timer()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._seconds, self.timeout_keep_alive_handler)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
