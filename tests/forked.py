"""The command line in child processes of a fork server, which has imported the libraries already."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import timm  # noqa: F401 - imported once here instead of in each child process
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from project.classifier import ImageClassifier
from project.cli.main import main
from project.data.sources.files import Files
from tests.integration.subprocesses import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked"])


@dataclass
class Run:
    """A running or finished command line."""

    process: BaseProcess
    log: Path

    def wait(self, seconds: float = 60) -> int:
        """Wait for the exit code; negative if a signal killed the process."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()  # otherwise pytest would wait for it
            raise AssertionError(f"still running after {seconds} s: {self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        """Everything printed so far, stdout and stderr."""
        return self.log.read_text()

    def await_text(self, text: str, seconds: float = 60) -> None:
        """Wait until the output contains a text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.is_alive() and time.monotonic() < deadline, f"no {text!r} in: {self.output}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start(
    folder: Path,
    arguments: Sequence[str],
    at: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    log: str = "log.txt",
    prepare: Callable[[], None] | None = None,
    script: str = "",
) -> Run:
    """Start a command line.

    Args:
        folder: Working directory.
        arguments: Arguments after ``python -m project``.
        at: When the process sends itself the signal ``number``: in the training step ``step``, or with ``validates`` in
            the validation after that step; or before it reads the image of index ``reads``.
        environment: Additional environment variables.
        log: File in the folder that receives the output.
        prepare: Function of a module, called in the process first.
        script: File in the folder that Lightning starts as the other ranks, with the same arguments.
    """
    (folder / log).write_text("")
    variables = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], **(environment or {})}
    arguments_of_child = (str(folder), str(folder / log), variables, list(arguments), at, prepare, script)
    process = CONTEXT.Process(target=_child, args=arguments_of_child)
    process.start()
    return Run(process, folder / log)


def run_ranks(
    folder: Path,
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]] = ({}, {}),
    prepare: Callable[[], None] | None = None,
    seconds: float = 120,
) -> list[tuple[int, str]]:
    """Run a command line in one process per rank, with the environment variables of torchrun.

    It replaces torchrun and Lightning's launcher, whose processes import the libraries for seconds.

    Args:
        folder: Working directory.
        arguments: Arguments after ``python -m project``; ``--trainer.devices`` and ``num_nodes`` must agree.
        environments: Additional environment variables of each rank.
        prepare: Function of a module, called in each process first.
        seconds: Time limit.

    Returns:
        Exit code and output of each rank.
    """
    count = len(environments)
    ranks = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    runs = [
        start(
            folder,
            arguments,
            environment={**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank), **more},
            log=f"rank{rank}.txt",
            prepare=prepare,
        )
        for rank, more in enumerate(environments)
    ]
    return [(run.wait(seconds), run.output) for run in runs]


def _child(
    folder: str,
    log: str,
    environment: Mapping[str, str],
    arguments: list[str],
    at: dict[str, Any] | None,
    prepare: Callable[[], None] | None,
    script: str,
) -> None:
    os.chdir(folder)
    sys.argv = [script, *arguments]
    os.environ.update(environment)
    rank = environment.get("RANK", environment.get("SLURM_PROCID", 0))
    rank_zero_only.rank = int(rank)  # Lightning sets it when it is imported
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default for the processes that it starts
    if prepare is not None:
        prepare()
    if at is not None:
        _signal_self(**at)
    sys.exit(main(arguments))


def _signal_self(
    step: int | None = None, number: int = signal.SIGKILL, validates: bool = False, reads: int | None = None
) -> None:
    """Patch the method of a training step, a validation step or an image read to send the signal first."""
    if reads is not None:
        remaining = itertools.count(reads, -1)
        _signal_before(Files, "content", lambda *_: next(remaining) == 0, number)
    else:

        def is_step(model: Any, *_: Any) -> bool:
            return bool(model.trainer.global_step == step and not model.trainer.sanity_checking)

        _signal_before(ImageClassifier, "validation_step" if validates else "training_step", is_step, number)


def _signal_before(cls: type, name: str, condition: Callable[..., bool], number: int) -> None:
    original = getattr(cls, name)

    def patched(*arguments: Any) -> Any:
        if condition(*arguments):
            os.kill(os.getpid(), number)
        return original(*arguments)

    setattr(cls, name, patched)
