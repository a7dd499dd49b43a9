"""A server in a thread, for tests."""

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from project.inference.many_tasks import ManyTasks
from project.inference.serving.app import make_app, make_server
from project.inference.serving.limits import RequestLimits
from project.inference.serving.served_model import ServedModel
from project.inference.serving.service import Batching, Service

VERSION = "1.2.3"


class Server:
    """A running server.

    Attributes:
        port: Its port.
        service: Its service.
    """

    def __init__(self, port: int, service: Service) -> None:
        self.port = port
        self.service = service

    def request(
        self, path: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON or text, and headers of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            text, found = response.read().decode(), {key.lower(): value for key, value in response.getheaders()}
            return response.status, json.loads(text) if "json" in found["content-type"] else text, found
        finally:
            connection.close()

    def send(self, request: bytes, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a request to ``/predict``, which may be answered before all of it is sent."""
        head, _, body = request.partition(b"\r\n\r\n")
        lines = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:])
        del lines["Content-Length"]  # set anew, as a test may have changed the body
        status, answer, _ = self.request("/predict", "POST", body, lines | headers)
        return status, answer

    def metric(self, name: str) -> float:
        """Value of a metric, by name and labels."""
        _, text, _ = self.request("/metrics")
        match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(match[1]) if match else 0.0


class GatedModel(ServedModel):
    """A model that answers once its gate is open.

    Attributes:
        entered: Set when a batch has begun.
        gate: Holds back all batches until it is set.
        batches: Sizes of the batches.
    """

    def __init__(self, tasks: ManyTasks, engines: Sequence[Any]) -> None:
        super().__init__(tasks, engines)
        self.entered, self.gate = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def answer(self, images: Sequence[list[torch.Tensor]]) -> list[dict[str, Any]]:
        self.batches.append(len(images))
        self.entered.set()
        assert self.gate.wait(20)
        return super().answer(images)


@contextlib.contextmanager
def serving(
    load_model: Callable[[], ServedModel],
    names: Sequence[str] = ("photos",),
    limits: RequestLimits | None = None,
    batching: Batching | None = None,
    token: str | None = None,
    ready: bool = True,
) -> Iterator[Server]:
    """A server in a thread, on a free port; by default once it is ready."""
    limits = limits or RequestLimits()
    service = Service(load_model, limits, batching or Batching(wait=0))
    started = threading.Event()
    app = make_app(service, names, VERSION, token, started.set)
    server = make_server(app, limits.max_seconds)
    with socket.create_server(("127.0.0.1", 0)) as opened:
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        try:
            assert not ready or started.wait(60)
            yield Server(opened.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
