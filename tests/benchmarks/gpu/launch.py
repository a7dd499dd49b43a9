"""Timed fits: in new processes on a GPU, in preloaded ones in the CPU smoke test."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.measure import CompletedRun, run_module
from tests.forked import start


def timed_fit(scale: Scale, *flags: object, cache: Path) -> CompletedRun:
    """Run ``python -m project fit`` to its end.

    Args:
        scale: Scale of the benchmark, with the device.
        flags: Flags of the fit.
        cache: Cache folder of torch.compile.

    Raises:
        RuntimeError: The fit failed; the message has its output.
    """
    if scale.device.type == "cuda":
        return run_module("project", "fit", *flags, cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        start_time = time.perf_counter()
        fit = start(Path(folder), ["fit", *map(str, flags)])
        code = fit.wait()
        if code:
            raise RuntimeError(f"The fit exited with code {code}: {fit.output[-4000:]}")
        return CompletedRun(time.perf_counter() - start_time, 0.0, fit.output, 0.0)


def features_lines(output: str) -> str:
    """The log lines in which a fit reports its stored features, joined."""
    return "; ".join(line.removeprefix("Features: ") for line in output.splitlines() if line.startswith("Features: "))
