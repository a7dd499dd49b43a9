"""Distributed runs: which rank this process has, how many processes there are, and what has started them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from project.errors import ProjectError

T = TypeVar("T")


def processes() -> int:
    """How many share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this is the process of rank zero, as far as is known yet."""
    # Lightning sets the rank when it is imported, and again when a run's processes know theirs.
    return int(getattr(rank_zero_only, "rank", environment_rank()[0])) == 0


def is_first_process() -> bool:
    """Whether this is the process of rank zero, also before Lightning's launcher has given processes their ranks."""
    # Of Lightning's own launcher on several nodes, no process knows its rank yet, only that of its node.
    return is_rank_zero() and os.environ.get("NODE_RANK", "0") == "0"


def environment_rank() -> tuple[int, int]:
    """Rank and number of processes, as torchrun or a cluster has put them into the environment; else 0 and 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_externally_launched() -> bool:
    """Whether something else has started all processes of a fit: torchrun, or SLURM."""
    return bool({"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & {*os.environ})


def launcher_pid() -> int | None:
    """The process of the same fit that has started this one, and ends it: Lightning's first one on a machine."""
    return os.getppid() if os.environ.get("LOCAL_RANK", "0") != "0" and not is_externally_launched() else None


def is_peer_failure(error: Exception) -> bool:
    """Whether an error says no more than that another process has ended."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo" in str(error)


@functools.lru_cache(1)
def _patient(together: Any) -> Any:
    """The same processes, who wait for each other as long as it takes.

    One may be computing rows for hours that another has done with; torch's own groups give up after 10 or 30 minutes.
    Whoever waits for a process that has ended is told at once all the same.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


class ProcessGroup:
    """All processes of ``torch.distributed``, or this one alone.

    Attributes:
        rank: Of this process.
        size: How many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._group = _patient(dist.group.WORLD) if together else None

    def part(self, count: int) -> slice:
        """This process's part of so many items: what lies together is read by one process."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all processes; each waits for the others here."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something that can fail: where one process fails, all do, so that none waits for it."""
        failure: Exception | None = None
        message: str | None = None
        try:
            yield
        except ProjectError as error:
            failure, message = error, str(error)
        except Exception as error:
            failure, message = error, f"Process {self.rank} failed: {type(error).__name__}: {error}"
        self.fail(self.gather(message), failure)

    def fail(self, messages: Sequence[str | None], failure: Exception | None = None) -> None:
        """Fail where some process has failed. The first process says it, others what they alone have to say.

        Args:
            messages: What went wrong in each process; ``None`` where all is well.
            failure: What went wrong in this one.

        Raises:
            ProjectError: Another process has failed, or this one.
        """
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        said = messages[failed[0]] or ""
        error = failure or ProjectError(said)
        if isinstance(error, ProjectError):
            error.reported_elsewhere = self.rank > 0 and messages[self.rank] in (None, said)
        raise error
