"""Dynamic batching: requests that arrive at about the same time are computed together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items into batches, which worker threads compute.

    A worker takes the waiting items as soon as they fill a batch, or as soon as the first of them has waited ``wait``
    seconds. While all workers compute, items accumulate, so batches grow with the load. Items whose future was
    cancelled are dropped.

    Args:
        compute: Maps a batch of items to as many results; called by one thread per worker.
        size: Largest batch.
        wait: Seconds that an item waits for others.
        workers: Number of threads.
        on_start: Called at the start of each thread.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        size: int,
        wait: float,
        workers: int = 1,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        self._compute = compute
        self._size = size
        self._wait = wait
        self._on_start = on_start
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, Item, Future[Result]]] = deque()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"batch-{index}") for index in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, item: Item) -> Future[Result]:
        """Add an item. The future has its result, or the error of its batch.

        Raises:
            RuntimeError: The batcher is closed.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("The batcher is closed.")
            self._waiting.append((time.monotonic(), item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute what is waiting, then stop the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[tuple[Item, Future[Result]]] | None:
        """The next batch, which may be empty; ``None`` after the last one."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            due = self._waiting[0][0] + self._wait
            while 0 < len(self._waiting) < self._size and not self._closed:
                seconds = due - time.monotonic()
                if seconds <= 0:
                    break
                self._changed.wait(seconds)
            taken = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            if self._waiting:
                self._changed.notify()  # another worker takes the rest
        return [(item, future) for _, item, future in taken if future.set_running_or_notify_cancel()]

    def _work(self) -> None:
        self._on_start()
        while (batch := self._take()) is not None:
            if not batch:
                continue
            try:
                results = self._compute([item for item, _ in batch])
            except BaseException as error:  # each request reports it
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)
