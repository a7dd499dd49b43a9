"""CPU and GPU utilization while a block of code runs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STAT = Path("/proc/stat")


class Utilization:
    """Utilization of an interval: from the start or the last :meth:`restart` to the last :meth:`mark` or the end.

    Attributes:
        seconds: Length of the interval.
        cpu: Utilization of all CPU cores in [0, 1]; ``None`` without ``/proc/stat``.
        gpu: Mean GPU utilization reported by the driver in [0, 1]; ``None`` without a GPU or ``nvidia-ml-py``.
    """

    seconds: float
    cpu: float | None
    gpu: float | None

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Start the interval now."""
        self._start, self._ticks = time.perf_counter(), _cpu_ticks()
        self._first_sample = len(self.samples)
        self.seconds, self.cpu, self.gpu = 0.0, None, None

    def mark(self) -> None:
        """End the interval now; a later mark extends it."""
        self.seconds = time.perf_counter() - self._start
        samples = self.samples[self._first_sample :]
        self.gpu = sum(samples) / len(samples) if samples else None
        idle, total = (now - before for now, before in zip(_cpu_ticks(), self._ticks, strict=True))
        self.cpu = 1 - idle / total if total else None

    def __str__(self) -> str:
        cpu, gpu = ("unknown" if share is None else f"{share:.0%}" for share in (self.cpu, self.gpu))
        return f"CPU utilization {cpu}, GPU utilization {gpu}"


@contextmanager
def measure_utilization(device: torch.device) -> Iterator[Utilization]:
    """Measure the utilization of the CPU and of a GPU while the block runs."""
    utilization, stop = Utilization(), threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(Exception):
                utilization.samples.append(torch.cuda.utilization(device) / 100)

    sampler = threading.Thread(target=sample, daemon=True) if _can_sample(device) else None
    if sampler is not None:
        sampler.start()
    try:
        yield utilization
    finally:
        stop.set()
        if sampler is not None:
            sampler.join()
        if not utilization.seconds:
            utilization.mark()


def _can_sample(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except Exception:  # nvidia-ml-py is missing or fails, for which it has many exception classes
        return False
    return True


def _cpu_ticks() -> tuple[int, int]:
    """Idle and total clock ticks of all CPU cores since boot; zeros without ``/proc/stat``."""
    if not STAT.exists():
        return 0, 0
    ticks = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
