"""Health, description, metrics, OpenAPI, and errors of the server."""

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from project import load
from project.errors import CheckpointError
from project.inference.many_tasks import ManyTasks
from project.inference.serving.served_model import ServedModel
from tests.benchmarks.load_client import form, raw
from tests.inference.serving.running_server import VERSION, GatedModel, Server, serving, wait_for


def test_health_and_predict_wait_for_the_model(gated: GatedModel, photo: bytes) -> None:
    loading = threading.Event()

    def load_model() -> ServedModel:
        assert loading.wait(20)
        return gated

    gated.gate.set()
    with serving(load_model, ready=False) as server:
        for path, method in (("/health", "GET"), ("/", "GET"), ("/predict", "POST")):
            status, answer, headers = server.request(path, method, photo if method == "POST" else None)
            assert status == 503 and "is being loaded" in answer["error"] and headers["retry-after"]
        loading.set()
        wait_for(lambda: server.request("/health")[0] == 200)
        assert server.request("/health")[1] == {"status": "ok"}
        assert server.send(raw(photo))[0] == 200


def test_failure_to_load_is_kept_for_the_command() -> None:
    def load_model() -> ServedModel:
        raise CheckpointError("It is damaged.")

    with serving(load_model) as server:
        assert str(server.service.error) == "It is damaged."
        assert server.request("/health")[0] == 503


def test_description_has_version_classes_and_fingerprints(server: Server, checkpoint: Path) -> None:
    status, answer, _ = server.request("/")
    model = load(checkpoint).model
    assert status == 200 and answer["version"] == VERSION
    assert answer["tasks"]["photos"]["classes"] == ["blue", "green", "red"]
    assert answer["tasks"]["photos"]["backbone"] == {"name": model.backbone.name, "sha256": model.backbone.sha256}
    other = ManyTasks.load([checkpoint])
    next(other.classifiers[0].head.parameters()).data[0] += 1
    digests = {answer["tasks"]["photos"]["sha256"], ServedModel(other, [None]).description["photos"]["sha256"]}
    assert len(digests) == 2 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_metrics_count_requests_by_status(server: Server, photo: bytes) -> None:
    server.send(raw(photo))
    server.send(form(photo))
    server.send(raw(b"x"))
    server.request("/no")
    server.request("/never/again")
    assert server.metric('serve_requests_total{path="/predict",status="200"}') == 2
    assert server.metric('serve_requests_total{path="/predict",status="422"}') == 1
    assert server.metric('serve_requests_total{path="other",status="404"}') == 2
    assert server.metric("serve_request_seconds_count") == 3
    assert server.metric("process_resident_memory_bytes") > 1e7


def test_openapi_lists_the_endpoints(server: Server) -> None:
    status, schema, _ = server.request("/openapi.json")
    assert status == 200 and schema["info"]["version"] == VERSION
    assert {path: list(methods) for path, methods in schema["paths"].items()} == {
        "/predict": ["post"],
        "/health": ["get"],
        "/": ["get"],
        "/metrics": ["get"],
    }
    predict = schema["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/octet-stream"}
    assert {"200", "401", "413", "415", "422", "503"} <= set(predict["responses"])
    assert list(schema["components"]["securitySchemes"]) == ["HTTPBearer"]
    properties = schema["components"]["schemas"]["Prediction"]["properties"]
    assert {"class", "probability", "top", "known", "set", "answered"} <= set(properties)


def test_unknown_paths_and_methods_are_refused_as_json(server: Server) -> None:
    for path, method, expected in (("/docs", "GET", 404), ("/predict", "GET", 405)):
        status, answer, _ = server.request(path, method)
        assert status == expected and "Available: /predict" in answer["error"]


def test_internal_error_is_json_and_logged(checkpoint: Path, photo: bytes, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ServedModel):
        def answer(self, images: Sequence[list[torch.Tensor]]) -> list[dict[str, Any]]:
            raise ValueError("secret path")

    with serving(lambda: Broken(ManyTasks.load([checkpoint]), [None])) as server:
        status, answer = server.send(raw(photo))
        assert status == 500 and answer == {"error": "Internal error; the log of the server has the details."}
        assert server.metric('serve_requests_total{path="/predict",status="500"}') == 1
    assert "secret path" in caplog.text
