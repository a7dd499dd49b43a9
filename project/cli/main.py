"""Entry point of the command line: runs a verb, prints errors and returns the exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TextIO

from project.cli.argument_order import split_checkpoint_flag
from project.cli.exit_messages import BROKEN_PIPE, describe
from project.cli.transfer_cli import PROGRAM, TransferCLI
from project.config.import_allowlist import restricted_imports, split_allow_imports
from project.runtime.distributed import is_externally_launched, is_rank_zero, launcher_pid
from project.runtime.process_state import process_state
from project.runtime.signals import Interrupted, SignalHandler

#: Warnings of Lightning and Pillow about intended behavior.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # data.num_workers is set from the machine
    ".*module.s. in eval mode at the start of training.*",  # the frozen stages
    ".*smaller than the logging interval.*",  # metrics are logged per epoch
    ".*callbacks used to create the checkpoint need to be provided.*",  # only fit has checkpoint callbacks
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # it is: the order depends on the epoch
    ".*sync_dist=True.*when logging on epoch level.*",  # logged values are identical on all ranks
    "The dirpath has changed from.*",  # a resumed fit has its own folder
    r".*monitor='val/accuracy'.* could not find the monitored key.*",  # a fit stopped before its first validation
    ".*`OneCycleLR` scheduler is using 'interval': 'epoch'.*",  # set by model.scheduler_interval
    ".*decompression bomb DOS attack.*",  # a large photograph; Pillow raises an error at twice that size
    ".*accumulate_grad_batches != 1.*overriding.*",  # the model's optimizer_step is meant for optimizer steps
    ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 with torch 2.14
)


def main(args: Sequence[str]) -> int:
    """Run a verb.

    Args:
        args: Command line, without the program's name.

    Returns:
        Exit code: 0; 1 if ``check`` found problems or another rank failed; 2 after a user error, with a message of one
        or two lines; 70 after an internal error; 141 if the output pipe is closed; 143 and 130 after SIGTERM and
        SIGINT.
    """
    try:
        extra_imports, rest = split_allow_imports(args)
        with _process_state(), SignalHandler(launcher_pid()) as signals, restricted_imports(extra_imports):
            code = TransferCLI(rest, signals, _resume_command(args)).exit_code
            if signals.received:
                raise Interrupted(signals.received, "The run had already finished; all results are saved.")
            return code
    except Interrupted as interruption:
        if is_rank_zero():
            print(interruption.message, file=sys.stderr)
        return interruption.exit_code
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        return _discard_output(sys.stdout)
    except Exception as error:
        if "--debug" in args:
            raise
        message, code = describe(error, args)
        try:
            if message:
                print(message, file=sys.stderr, flush=True)
        except BrokenPipeError:
            return _discard_output(sys.stderr)
        return code


def _process_state() -> AbstractContextManager[None]:
    return process_state(
        ignored_warnings=IGNORED_WARNINGS,
        format_warning=lambda message, *_: f"warning: {message}\n",
        ignored_records={"lightning.pytorch.utilities.rank_zero": "try installing"},  # Lightning's advertisements
        stdout_errors="backslashreplace",  # file names may not be valid UTF-8
    )


def _resume_command(args: Sequence[str]) -> str:
    """The command that resumes the fit, without its ``--ckpt_path``."""
    if is_externally_launched():
        return "the original command with"
    return shlex.join([*PROGRAM.split(), *split_checkpoint_flag(args)[1]])


def _discard_output(stream: TextIO) -> int:
    """Redirect a closed stream to the null device, as the interpreter flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return BROKEN_PIPE
