"""State of the whole process that a command changes, and that is as it was when the command is done."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def process_state(
    *,
    environment: Mapping[str, str] | None = None,
    socket_timeout: float | None = None,
    ignored_warnings: Sequence[str] = (),
    format_warning: Callable[..., str] | None = None,
    ignored_records: Mapping[str, str] | None = None,
    log_levels: Mapping[str, int] | None = None,
    stdout_errors: str | None = None,
) -> Iterator[None]:
    """Set state of the process, and restore it on exit, with whatever else has changed it in between.

    Args:
        environment: Variables to set. All variables are restored, those that a library has set too.
        socket_timeout: Seconds that a new socket waits by default.
        ignored_warnings: Regular expressions of warnings that are not shown.
        format_warning: Takes the place of ``warnings.formatwarning``.
        ignored_records: A part of the log messages to drop, by the logger's name.
        log_levels: The level below which messages are dropped, by the logger's name.
        stdout_errors: What standard output does about characters that it cannot encode, such as ``backslashreplace``.
    """
    variables, timeout, formatter = dict(os.environ), socket.getdefaulttimeout(), warnings.formatwarning
    stdout = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None  # a test or a notebook has another kind
    encoding_errors = None if stdout is None else stdout.errors
    filters = [(logging.getLogger(name), _without(part)) for name, part in (ignored_records or {}).items()]
    levels = [(logging.getLogger(name), level) for name, level in (log_levels or {}).items()]
    levels_before = [logger.level for logger, _ in levels]
    with warnings.catch_warnings():
        try:
            os.environ.update(environment or {})
            if socket_timeout is not None:
                socket.setdefaulttimeout(socket_timeout)
            for message in ignored_warnings:
                warnings.filterwarnings("ignore", message=message)
            if format_warning is not None:
                warnings.formatwarning = format_warning
            for logger, drops in filters:
                logger.addFilter(drops)
            for logger, level in levels:
                logger.setLevel(level)
            if stdout is not None and stdout_errors is not None:
                stdout.reconfigure(errors=stdout_errors)
            yield
        finally:
            for logger, drops in filters:
                logger.removeFilter(drops)
            for (logger, _), level in zip(levels, levels_before, strict=True):
                logger.setLevel(level)
            warnings.formatwarning = formatter
            socket.setdefaulttimeout(timeout)
            os.environ.clear()
            os.environ.update(variables)
            if stdout is not None and not stdout.closed:
                stdout.reconfigure(errors=encoding_errors)


def _without(part: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: part not in record.getMessage()
