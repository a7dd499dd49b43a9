"""Distributed runs: rank, world size, launcher, and communication between ranks."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from project.errors import ProjectError

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 where ``torch.distributed`` is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process has rank zero, as far as is known yet; see :func:`is_first_process`."""
    # Lightning sets rank_zero_only.rank on import, and again when the launcher assigns ranks.
    return int(getattr(rank_zero_only, "rank", environment_rank()[0])) == 0


def is_first_process() -> bool:
    """Whether this process will have rank zero, also before Lightning's launcher assigns the ranks."""
    # With Lightning's launcher on several nodes, a process knows only the rank of its node at first.
    return is_rank_zero() and os.environ.get("NODE_RANK", "0") == "0"


def environment_rank() -> tuple[int, int]:
    """Rank and world size from the environment variables of torchrun or a cluster; (0, 1) if they are unset."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_externally_launched() -> bool:
    """Whether torchrun or SLURM started the processes, rather than Lightning."""
    return bool({"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & {*os.environ})


def launcher_pid() -> int | None:
    """Process id of the rank that started this one through Lightning's launcher; ``None`` for the first rank."""
    return os.getppid() if os.environ.get("LOCAL_RANK", "0") != "0" and not is_externally_launched() else None


def is_peer_failure(error: Exception) -> bool:
    """Whether an error only reports that another rank has exited."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo" in str(error)


@functools.lru_cache(1)
def _group_without_timeout(world: Any) -> Any:
    """A gloo group of all ranks whose collectives practically never time out.

    One rank may compute features for hours while the others wait; torch's default timeout is 10 or 30 minutes. A rank
    that waits for an exited one still fails immediately. ``world`` is the cache key.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


class ProcessGroup:
    """The ranks of ``torch.distributed``, or this process alone if it is not initialized.

    Attributes:
        rank: Rank of this process.
        size: World size.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_distributed else 0
        self.size = dist.get_world_size() if is_distributed else 1
        self._group = _group_without_timeout(dist.group.WORLD) if is_distributed else None

    def rank_slice(self, count: int) -> slice:
        """This rank's contiguous slice of ``count`` items."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """Gather a value from every rank, on every rank. Blocks until all ranks call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    def shares(self, folder: Path) -> bool:
        """Whether this rank sees the folder of rank zero, and not one of the same path on another machine.

        Blocks until all ranks call it.

        Args:
            folder: An existing folder.

        Raises:
            OSError: Rank zero cannot write to the folder, or this rank has no access to it.
            ProjectError: The same of another rank.
        """
        if self.size == 1:
            return True
        marker = folder / f".seen-{self.gather(uuid.uuid4().hex)[0]}"
        with self.propagate_errors():
            if self.rank == 0:
                marker.touch()
        try:
            with self.propagate_errors():  # raised where the folder is closed to this rank
                return marker.exists()
        finally:
            if self.rank == 0:
                marker.unlink(missing_ok=True)

    @contextmanager
    def propagate_errors(self) -> Iterator[None]:
        """Raise on all ranks if the block raises on any, so that no rank waits for a failed one."""
        failure: Exception | None = None
        message: str | None = None
        try:
            yield
        except ProjectError as error:
            failure, message = error, str(error)
        except Exception as error:
            failure, message = error, f"Rank {self.rank} failed: {type(error).__name__}: {error}"
        self.raise_if_any_failed(self.gather(message), failure)

    def raise_if_any_failed(self, messages: Sequence[str | None], failure: Exception | None = None) -> None:
        """Raise if a rank has failed. Rank zero reports the first message; other ranks report only their own.

        Args:
            messages: Error message of each rank; ``None`` for success.
            failure: The exception of this rank, if it failed.

        Raises:
            ProjectError: This rank or another one failed.
        """
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        first_message = messages[failed[0]] or ""
        error = failure or ProjectError(first_message)
        if isinstance(error, ProjectError):
            error.reported_elsewhere = self.rank > 0 and messages[self.rank] in (None, first_message)
        raise error
