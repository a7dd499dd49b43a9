"""Prometheus metrics of the server."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Attributes:
        registry: Their registry.
        requests: Requests by path and status.
        seconds: Time of the requests to ``/predict``.
        in_progress: Requests to ``/predict`` in progress.
        batch_images: Images per batch.
        info: Version and tasks.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("serve_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "serve_request_seconds", "Time of a request to /predict", buckets=SECONDS, registry=registry
        )
        self.in_progress = Gauge("serve_requests_in_progress", "Requests to /predict in progress", registry=registry)
        self.batch_images = Histogram("serve_batch_images", "Images per batch", buckets=BATCH_SIZES, registry=registry)
        self.info = Info("serve", "Version and tasks of the server", registry=registry)
        ProcessCollector(registry=registry)


class MeasuredRequests:
    """ASGI middleware that counts and times requests.

    Args:
        app: The application.
        metrics: Receives the values.
        paths: Paths to distinguish; all others count as one.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            path: Any = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, status).inc()
            if path == "/predict":
                self._metrics.seconds.observe(time.perf_counter() - start)
