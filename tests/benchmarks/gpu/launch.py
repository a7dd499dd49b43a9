"""Fits and other programs, timed: as whole processes on a card, in preloaded ones where only the script is tested."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.measure import Ran, process
from tests.forked import start


def timed_fit(scale: Scale, *flags: object, cache: Path) -> Ran:
    """Run ``python -m project fit`` to its end.

    Args:
        scale: Where to run it.
        flags: Of the fit.
        cache: Folder of what torch.compile keeps.

    Raises:
        RuntimeError: It failed; the message has what it printed.
    """
    if scale.device.type == "cuda":
        return process("project", "fit", *flags, cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        fit = start(Path(folder), ["fit", *map(str, flags)])
        code = fit.wait()
        if code:
            raise RuntimeError(f"A fit ended with {code}: {fit.said[-4000:]}")
        return Ran(time.perf_counter() - began, 0.0, fit.said, 0.0)


def features_lines(output: str) -> str:
    """What a fit says of its features."""
    return "; ".join(line.removeprefix("Features: ") for line in output.splitlines() if line.startswith("Features: "))
