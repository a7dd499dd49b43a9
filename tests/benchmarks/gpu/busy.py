"""How busy the processor and the card are while something runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STAT = Path("/proc/stat")


class Busy:
    """Shares of a span of time: from the start, or the last :meth:`restart`, to the last :meth:`mark`, or the end.

    Attributes:
        seconds: Length of the span.
        cpu: Share of all the machine's cores that was in use, in [0, 1]; ``None`` where there is no ``/proc/stat``.
        gpu: Mean utilization that the driver reports, in [0, 1]; ``None`` without a card or without ``nvidia-ml-py``.
    """

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Begin the span here."""
        self._began, self._ticks = time.perf_counter(), _ticks()
        self._first = len(self.samples)
        self.seconds, self.cpu, self.gpu = 0.0, None, None

    def mark(self) -> None:
        """End the span here, unless another mark follows."""
        self.seconds = time.perf_counter() - self._began
        samples = self.samples[self._first :]
        self.gpu = sum(samples) / len(samples) if samples else None
        idle, total = (now - then for now, then in zip(_ticks(), self._ticks, strict=True))
        self.cpu = 1 - idle / total if total else None

    seconds: float
    cpu: float | None
    gpu: float | None

    def __str__(self) -> str:
        cpu, gpu = ("unknown" if share is None else f"{share:.0%}" for share in (self.cpu, self.gpu))
        return f"CPU {cpu} busy, GPU {gpu} busy"


@contextmanager
def measure_busy(device: torch.device) -> Iterator[Busy]:
    """Watch the machine and a card while the block runs."""
    busy, over = Busy(), threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            with contextlib.suppress(Exception):
                busy.samples.append(torch.cuda.utilization(device) / 100)

    watcher = threading.Thread(target=sample, daemon=True) if _can_sample(device) else None
    if watcher is not None:
        watcher.start()
    try:
        yield busy
    finally:
        over.set()
        if watcher is not None:
            watcher.join()
        if not busy.seconds:
            busy.mark()


def _can_sample(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except Exception:  # nvidia-ml-py is missing, or refuses in one of many ways
        return False
    return True


def _ticks() -> tuple[int, int]:
    """Idle and all clock ticks of the machine's cores since its start; zeros where the kernel does not tell."""
    if not STAT.exists():
        return 0, 0
    ticks = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
