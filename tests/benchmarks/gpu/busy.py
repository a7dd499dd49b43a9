"""How busy the processor and the card are while something runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from project.runtime.system import cores


@dataclass
class Busy:
    """Shares of a time span, each in [0, 1].

    Attributes:
        seconds: Length of the span.
        cpu: Share of all cores that this process and its ended children used.
        gpu: Mean utilization that the driver reports; ``None`` without a card or without ``nvidia-ml-py``.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    gpu: float | None = None

    def __str__(self) -> str:
        gpu = "unknown" if self.gpu is None else f"{self.gpu:.0%}"
        return f"CPU {self.cpu:.0%} busy, GPU {gpu} busy"


@contextmanager
def measure_busy(device: torch.device) -> Iterator[Busy]:
    """Fill in a :class:`Busy` when the block ends."""
    found, samples, over = Busy(), [], threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            with contextlib.suppress(Exception):
                samples.append(torch.cuda.utilization(device) / 100)

    watcher = threading.Thread(target=sample, daemon=True) if _can_sample(device) else None
    if watcher is not None:
        watcher.start()
    began, used = time.perf_counter(), _cpu_seconds()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - began
        found.cpu = (_cpu_seconds() - used) / found.seconds / cores()
        over.set()
        if watcher is not None:
            watcher.join()
        found.gpu = sum(samples) / len(samples) if samples else None


def _can_sample(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.utilization(device)
    except Exception:  # nvidia-ml-py is missing, or refuses in one of many ways
        return False
    return True


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
