"""Start several Python processes at once, and wait for them with a timeout."""

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
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] = (), timeout: float = 400
) -> list[tuple[int, str]]:
    """Run several Python processes concurrently.

    Args:
        commands: Arguments of each process.
        environments: Additional environment variables of each process.
        timeout: Seconds after which the processes and their children are killed.

    Returns:
        Exit code and output of each process.
    """
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environments = [*environments, *[{}] * (len(commands) - len(environments))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    processes = [
        subprocess.Popen([sys.executable, *command], env={**base, **environment}, **pipes)  # type: ignore[call-overload]
        for command, environment in zip(commands, environments, strict=True)
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 1))[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.poll() is None:  # torchrun's workers have their own process groups; only torchrun ends them
                    process.terminate()
                    process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def free_port() -> str:
    """A free TCP port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
