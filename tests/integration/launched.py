"""Several processes of one run, that no test waits for longer than it has to."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node"]


def run_all(
    commands: Sequence[Sequence[str]], more: Sequence[Mapping[str, str]] = (), timeout: float = 400
) -> list[tuple[int, str]]:
    """Run Python at once with each of the arguments.

    Args:
        commands: Arguments of each.
        more: Environment of each, besides that of this process.
        timeout: Seconds, after which all of them and their children are killed.

    Returns:
        The exit code of each, and what it said.
    """
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own = [*more, *[{}] * (len(commands) - len(more))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    started = [
        subprocess.Popen([sys.executable, *command], env={**base, **each}, **pipes)  # type: ignore[call-overload]
        for command, each in zip(commands, own, strict=True)
    ]
    until = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(until - time.monotonic(), 1))[0] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.poll() is None:  # torchrun's workers are in groups of their own: it has to end them itself
                    process.terminate()
                    process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return [(process.returncode, out) for process, out in zip(started, said, strict=True)]


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])
