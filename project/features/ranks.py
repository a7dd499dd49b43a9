"""The processes of a distributed fit, as far as a store of features needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from project.errors import ProjectError

T = TypeVar("T")


class Ranks:
    """All processes of ``torch.distributed``, or this one alone.

    Attributes:
        rank: Of this process.
        size: How many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    def part(self, count: int) -> slice:
        """This process's part of so many items: what lies together is read by one process."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all processes; each waits for the others here."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something that can fail: where one process fails, all do, so that none waits for it."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        told = self.gather(failure and str(failure))
        if failure:
            raise failure
        for rank, message in enumerate(told):
            if message:
                raise ProjectError(f"Process {rank} failed: {message}")
