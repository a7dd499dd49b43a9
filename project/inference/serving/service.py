"""The service behind the HTTP endpoints: loads the model, decodes, batches and answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from project.inference.serving.batching import Batcher
from project.inference.serving.limits import RefusedError, RequestLimits, unavailable
from project.inference.serving.metrics import Metrics
from project.inference.serving.served_model import ServedModel
from project.inference.serving.uploads import CLIENT_CLOSED, check_header
from project.runtime.system import cores

DECODED_AHEAD = 2  # images that are decoded or wait for it, for each core


@dataclass(frozen=True)
class Batching:
    """How requests are computed together.

    Attributes:
        size: Largest number of images per batch; by default the one that the engine computes best.
        wait: Longest time in milliseconds that a request waits for others.
    """

    size: int | None = None
    wait: float = 2.0


class Service:
    """Answers requests, once the model is loaded.

    Args:
        load: Loads the model; called in a thread.
        limits: What is accepted.
        batching: How requests are computed together.

    Attributes:
        metrics: Its metrics.
        model: The model; ``None`` until it is loaded.
        error: Why the model could not be loaded.
    """

    def __init__(self, load: Callable[[], ServedModel], limits: RequestLimits, batching: Batching) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self.model: ServedModel | None = None
        self.error: Exception | None = None
        self._load = load
        self._batching = batching
        self._in_progress = 0
        self._batcher: Batcher[list[torch.Tensor], dict[str, Any]] | None = None
        # While all threads decode slow images, uploads of requests that are given up must not wait in the pool.
        self._decoding = asyncio.Semaphore(DECODED_AHEAD * cores())
        self._decoders = ThreadPoolExecutor(cores(), "decode", torch.set_num_threads, (1,))

    async def start(self) -> None:
        """Load the model. An error is kept in :attr:`error`."""
        try:
            model = await asyncio.to_thread(self._load)
        except Exception as error:  # the command raises it when the server has stopped
            self.error = error
            return
        threads = torch.get_num_threads()
        workers = threads if model.single_threaded else 1
        self._batcher = Batcher(
            self._compute,
            self._batching.size or model.batch_size,
            self._batching.wait / 1000,
            workers,
            lambda: torch.set_num_threads(threads // workers),
        )
        self.model = model

    def close(self) -> None:
        """Stop the threads."""
        self._decoders.shutdown()
        if self._batcher is not None:
            self._batcher.close()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Context of a request in progress.

        Raises:
            RefusedError: The model is not loaded, or too many requests are in progress.
        """
        if self.model is None:
            raise unavailable("The model is being loaded.")
        if self._in_progress >= self.limits.max_requests:
            raise unavailable(f"{self._in_progress} requests are in progress; try again later.")
        self._in_progress += 1
        self.metrics.in_progress.inc()
        try:
            yield
        finally:
            self._in_progress -= 1
            self.metrics.in_progress.dec()

    async def answer(self, content: bytes, disconnected: Awaitable[None]) -> dict[str, Any]:
        """Answer an image. If the client leaves or the time is up, the work that has not begun is dropped.

        Args:
            content: The bytes of a file.
            disconnected: Returns when the client has closed its connection.

        Returns:
            The answer of each task by name.

        Raises:
            RefusedError: The image cannot be read or is too large, or the time is up.
        """
        work, gone = asyncio.ensure_future(self._answer(content)), asyncio.ensure_future(disconnected)
        try:
            done, _ = await asyncio.wait({work, gone}, timeout=self.limits.max_seconds, return_when="FIRST_COMPLETED")
            if work in done:
                return work.result()
            if gone in done:
                raise RefusedError(CLIENT_CLOSED, "The client has closed the connection.")
            raise unavailable(f"No answer within {self.limits.max_seconds:g} seconds; try again later.")
        finally:
            work.cancel()
            gone.cancel()

    async def _answer(self, content: bytes) -> dict[str, Any]:
        assert self._batcher is not None  # place() refuses requests before
        await self._decoding.acquire()
        decoding = asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, content)
        decoding.add_done_callback(lambda _: self._decoding.release())
        images = await asyncio.shield(decoding)  # a thread cannot be stopped: it is free when the image is decoded
        return await asyncio.wrap_future(self._batcher.submit(images))

    def _decode(self, content: bytes) -> list[torch.Tensor]:
        assert self.model is not None
        check_header(content, self.limits)
        return self.model.prepare(content)

    def _compute(self, images: Sequence[list[torch.Tensor]]) -> list[dict[str, Any]]:
        assert self.model is not None
        self.metrics.batch_images.observe(len(images))
        return self.model.answer(images)
