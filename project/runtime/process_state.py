"""Set process-wide state for one command, and restore it afterwards."""

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
    """Set process-wide state, and restore it on exit, including changes that libraries made in between.

    Args:
        environment: Environment variables to set.
        socket_timeout: Default timeout of new sockets, in seconds.
        ignored_warnings: Regular expressions of warnings to suppress.
        format_warning: Replacement for ``warnings.formatwarning``.
        ignored_records: Logger name to a substring; log messages that contain it are dropped.
        log_levels: Logger name to its minimum level.
        stdout_errors: Encoding error handler of standard output, such as ``backslashreplace``.
    """
    variables, timeout, formatter = dict(os.environ), socket.getdefaulttimeout(), warnings.formatwarning
    stdout = sys.stdout if isinstance(sys.stdout, io.TextIOWrapper) else None  # not under pytest or in a notebook
    encoding_errors = None if stdout is None else stdout.errors
    filters = [(logging.getLogger(name), _excludes(text)) for name, text in (ignored_records or {}).items()]
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
            for logger, log_filter in filters:
                logger.addFilter(log_filter)
            for logger, level in levels:
                logger.setLevel(level)
            if stdout is not None and stdout_errors is not None:
                stdout.reconfigure(errors=stdout_errors)
            yield
        finally:
            for logger, log_filter in filters:
                logger.removeFilter(log_filter)
            for (logger, _), level in zip(levels, levels_before, strict=True):
                logger.setLevel(level)
            warnings.formatwarning = formatter
            socket.setdefaulttimeout(timeout)
            os.environ.clear()
            os.environ.update(variables)
            if stdout is not None and not stdout.closed:
                stdout.reconfigure(errors=encoding_errors)


def _excludes(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()
