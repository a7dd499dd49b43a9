"""The entry point: one command line, its exit code, and errors for people."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TextIO

from project.cli.checkpoint_defaults import split_checkpoint_flag
from project.cli.exit_messages import BROKEN_PIPE, describe
from project.cli.transfer_cli import PROGRAM, TransferCLI
from project.config.import_allowlist import allowed_imports, imports_limited
from project.runtime.distributed import is_externally_launched, is_rank_zero, launcher_pid
from project.runtime.process_state import process_state
from project.runtime.signals import Interrupted, SignalHandler


def _again(args: Sequence[str]) -> str:
    """The command that goes on with a fit, but for the checkpoint."""
    if is_externally_launched():
        return "the command that it was started with, and"
    return shlex.join([*PROGRAM.split(), *split_checkpoint_flag(args)[1]])


#: What Lightning warns of that is as it should be here.
EXPECTED = (
    ".*does not have many workers.*",  # data.num_workers knows the machine
    ".*module.s. in eval mode at the start of training.*",  # the frozen ones
    ".*smaller than the logging interval.*",  # metrics are logged an epoch
    ".*callbacks used to create the checkpoint need to be provided.*",  # validate, test and predict save none
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # it is: the order is one of the epoch
    ".*sync_dist=True.*when logging on epoch level.*",  # what is logged is the same in all processes
    "The dirpath has changed from.*",  # a resumed fit has a folder of its own
    r".*monitor='val/accuracy'.* could not find the monitored key.*",  # a fit that ended before it validated
    ".*`OneCycleLR` scheduler is using 'interval': 'epoch'.*",  # where model.scheduler_interval asks for it
    ".*decompression bomb DOS attack.*",  # a large photograph; of twice that size it would be an error
    ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.14
)


def _process_state() -> AbstractContextManager[None]:
    return process_state(
        ignored_warnings=EXPECTED,
        format_warning=lambda message, *_: f"warning: {message}\n",
        ignored_records={"lightning.pytorch.utilities.rank_zero": "try installing"},  # Lightning's advertisements
        stdout_errors="backslashreplace",  # a file's name need not be text
    )


def main(args: Sequence[str]) -> int:
    """Run a verb.

    Args:
        args: Command line, without the program's name.

    Returns:
        Exit code: 0; 1 where ``check`` found problems, or another process has failed; 2 after a mistake of the user's,
            with a message of one or two lines; 70 after an internal error; 141 where the output pipe is closed;
            143 and 130 after SIGTERM and SIGINT.
    """
    try:
        more, rest = allowed_imports(args)
        with _process_state(), SignalHandler(launcher_pid()) as signals, imports_limited(more):
            code = TransferCLI(rest, signals, _again(args)).exit_code
            if signals.received:
                raise Interrupted(signals.received, "It was done already, and everything is saved.")
            return code
    except Interrupted as stop:
        if is_rank_zero():
            print(stop.message, file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:  # whoever reads the output has stopped, as head does
        return _silenced(sys.stdout)
    except Exception as error:
        if "--debug" in args:
            raise
        message, code = describe(error, args)
        try:
            if message:
                print(message, file=sys.stderr, flush=True)
        except BrokenPipeError:
            return _silenced(sys.stderr)
        return code


def _silenced(stream: TextIO) -> int:
    """Lead a stream that nobody reads to nowhere, or the interpreter would fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return BROKEN_PIPE
