"""The HTTP endpoints, over real connections."""

import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from project import load
from project.errors import CheckpointError, ConfigError
from project.features.provider import RowProvider
from project.inference.many_tasks import ManyTasks
from project.inference.serving.app import Prediction, make_app, make_server
from project.inference.serving.limits import RefusedError, RequestLimits
from project.inference.serving.served_model import ServedModel, select_engines, set_policies
from project.inference.serving.service import Batching, Service
from project.inference.serving.uploads import check_header
from tests.benchmarks.load_client import BOUNDARY, form, many_scans, png, raw

VERSION = "1.2.3"
TOKEN = "a-secret-of-sixteen"
ANSWERS = {"coverage": 0.6, "max_error": 0.5, "false_alarms": 0.5}


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
    service = Service(load_model, limits or RequestLimits(), batching or Batching(wait=0))
    started = threading.Event()
    app = make_app(service, names, VERSION, token, started.set)
    server = make_server(app)
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


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def photo(photos: Path) -> bytes:
    return (photos / "val/red/0.png").read_bytes()


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None])) as running:
        yield running


@pytest.fixture
def gated(checkpoint: Path) -> Iterator[GatedModel]:
    """A model whose gate opens at the end of the test at the latest."""
    model = GatedModel(ManyTasks.load([checkpoint]), [None])
    yield model
    model.gate.set()


@pytest.mark.parametrize("make", [form, raw])
def test_answer_equals_load_on_the_same_bytes(
    make: Callable[[bytes], bytes], server: Server, checkpoint: Path, photos: Path
) -> None:
    classifier = load(checkpoint)
    for path in sorted(photos.glob("test/*/0.png")):
        status, answer = server.send(make(path.read_bytes()))
        (expected,) = classifier.predict_proba([path.read_bytes()])
        assert status == 200
        assert answer["class"] == classifier.predict([path])[0] == answer["top"][0]["class"]
        assert answer["probability"] == pytest.approx(expected.max(), abs=1e-6)
        probabilities = {item["class"]: item["probability"] for item in answer["top"]}
        assert probabilities == pytest.approx(dict(zip(classifier.classes_, expected.tolist(), strict=True)), abs=1e-6)
        assert set(answer) == {"class", "probability", "top"}
        Prediction.model_validate(answer)


def test_other_kinds_of_images_are_decoded_as_load_decodes_them(server: Server, checkpoint: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = torch.randint(0, 256, (400, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for kind, image in {"JPEG": Image.fromarray(noise), "PNG": Image.fromarray(noise[..., 0]).convert("I;16")}.items():
        file = io.BytesIO()
        image.save(file, kind, **({"exif": exif} if kind == "JPEG" else {}))
        status, answer = server.send(raw(file.getvalue()))
        (expected,) = load(checkpoint).predict_proba([file.getvalue()])
        assert status == 200 and answer["probability"] == pytest.approx(expected.max(), abs=1e-6)


def test_calibrated_answers_equal_those_of_load(checkpoint: Path, photos: Path) -> None:
    def load_model() -> ServedModel:
        tasks = ManyTasks.load([checkpoint])
        set_policies(tasks, ANSWERS)
        return ServedModel(tasks, [None])

    paths = sorted(photos.glob("test/*/1.png"))
    with serving(load_model) as server:
        answers = [server.send(form(path.read_bytes()))[1] for path in paths]
    for answer, expected in zip(answers, load(checkpoint).answer(paths, **ANSWERS), strict=True):
        assert answer["class"] == expected.label and answer["set"] == expected.classes
        assert (answer["known"], answer["answered"]) == (expected.known, expected.answered)
        assert answer["calibrated_probability"] == pytest.approx(expected.probability, abs=1e-6)
        Prediction.model_validate(answer)


def test_limit_of_answers_that_a_checkpoint_does_not_permit_names_the_flag(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Task photos: --coverage.*"):
        set_policies(ManyTasks.load([checkpoint]), {"coverage": 0.9999, "max_error": None, "false_alarms": None})


def test_several_tasks_are_answered_by_name(checkpoint: Path, trained: Path, photo: bytes) -> None:
    paths = [checkpoint, trained / "checkpoints/last.ckpt"]
    tasks = load(paths)
    with serving(lambda: ServedModel(ManyTasks.load(paths), [None]), tasks.names) as server:
        status, answer = server.send(raw(photo))
        assert status == 200 and list(answer) == tasks.names and len(tasks.names) == 2
        for name, probabilities in tasks.predict_proba([photo]).items():
            assert answer[name]["probability"] == pytest.approx(probabilities.max(), abs=1e-6)
        schema = server.request("/openapi.json")[1]["components"]["schemas"]["Predictions"]
        assert list(schema["properties"]) == tasks.names


def test_engine_of_the_store_gives_the_same_answers(checkpoint: Path, photo: bytes, tmp_path: Path) -> None:
    provider = RowProvider("onnxruntime", "fp32", 1.0, tmp_path)
    tasks = ManyTasks.load([checkpoint])
    engines, reasons = select_engines(tasks, provider, "32-true")
    model = ServedModel(tasks, engines)
    assert reasons[0].startswith("onnxruntime fp32") and model.single_threaded and model.batch_size == 8
    (answer,) = model.answer([model.prepare(photo)])
    (expected,) = load(checkpoint).predict_proba([photo])
    assert answer["photos"]["probability"] == pytest.approx(expected.max(), abs=1e-4)
    model.warm_up()


def test_torch_engine_is_the_model_itself(checkpoint: Path, photo: bytes, tmp_path: Path) -> None:
    tasks = ManyTasks.load([checkpoint])
    engines, _ = select_engines(tasks, RowProvider("torch", "fp32", 1.0, tmp_path), "32-true")
    assert engines == [None]


def test_int8_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.precision int8 needs training images"):
        select_engines(ManyTasks.load([checkpoint]), RowProvider("auto", "int8", 1.0, tmp_path), "32-true")


def test_concurrent_requests_are_computed_together(gated: GatedModel, photo: bytes) -> None:
    with serving(lambda: gated, batching=Batching(size=4, wait=0)) as server, ThreadPoolExecutor(9) as pool:
        first = pool.submit(server.send, raw(photo))
        assert gated.entered.wait(20)
        others = [pool.submit(server.send, raw(photo)) for _ in range(8)]
        _wait(lambda: len(server.service._batcher._waiting) == 8)  # type: ignore[union-attr]
        gated.gate.set()
        answers = [future.result(20) for future in (first, *others)]
        assert gated.batches == [1, 4, 4]
        assert server.metric("serve_batch_images_count") == 3 and server.metric("serve_batch_images_sum") == 9
    assert {status for status, _ in answers} == {200}
    assert len({answer["class"] for _, answer in answers}) == 1


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_hostile_uploads_are_refused_and_the_server_continues(server: Server, photo: bytes) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(file, "JPEG")
    jpeg = file.getvalue()
    uploads = {
        form(png(30_000, 30_000)): (413, "more than 50 megapixels"),
        raw(png(9_000, 9_000)): (413, "9000 x 9000 pixels, more than 50 megapixels"),
        raw(many_scans(jpeg, 200)): (413, "scans, too many for 48 x 40 pixels"),
        form(b"no image\n" * 100): (422, "not a readable image"),
        raw(jpeg[: len(jpeg) // 2]): (422, "The image cannot be read"),
        raw(photo[: len(photo) // 2]): (422, "The image cannot be read"),
        raw(b""): (400, "0 bytes"),
        form(b""): (400, "0 bytes"),
        raw(photo + bytes(21_000_000)): (413, "more than 20 MB"),
        form(bytes(100_000_000)): (413, "more than 20 MB"),
        form(photo).replace(b'name="image"; ', b""): (400, "form"),
        form(photo).replace(BOUNDARY.encode(), b"other", 1): (400, "form"),
        form(photo).replace(b'; filename="photo.jpg"', b""): (400, "one file and no other field"),
    }
    for request, (expected, text) in uploads.items():
        status, answer = server.send(request)
        assert status == expected and text in answer["error"], (answer, expected, text)
        assert "\n" not in answer["error"]
    assert server.send(raw(photo))[0] == 200


def test_addresses_are_not_fetched(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(0.3)
        url = f"http://127.0.0.1:{target.getsockname()[1]}/a.png"
        body = json.dumps({"url": url}).encode()
        status, answer, _ = server.request("/predict", "POST", body, {"Content-Type": "application/json"})
        assert status == 415 and "application/json is not supported" in answer["error"]
        for content_type in ("text/plain", "application/x-www-form-urlencoded"):
            assert server.request("/predict", "POST", url, {"Content-Type": content_type})[0] == 415
        assert server.send(raw(url.encode()))[0] == 422
        assert server.send(form(url.encode()).replace(b'; filename="photo.jpg"', b""))[0] == 400
        with pytest.raises(TimeoutError):
            target.accept()


def test_upload_without_a_length_is_limited(checkpoint: Path, photo: bytes) -> None:
    limits = RequestLimits(max_megabytes=0.01)
    assert 1000 < len(photo) < 10_000
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None]), limits=limits) as server:
        assert server.request("/predict", "POST", iter([photo[:900], photo[900:]]))[0] == 200
        status, answer, _ = server.request("/predict", "POST", iter([photo, bytes(5_000), bytes(5_000)]))
        assert status == 413 and "more than 0.01 MB" in answer["error"]


def test_slow_upload_is_refused(checkpoint: Path, photo: bytes) -> None:
    limits = RequestLimits(max_seconds=0.3)
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None]), limits=limits) as server:
        for request in (raw(photo), form(photo)):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(request[:-10])
                assert b"408 " in connection.recv(1000)
        assert server.send(raw(photo))[0] == 200
        assert server.metric("serve_requests_in_progress") == 0


def test_endless_headers_are_refused(server: Server, photo: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-Long: " + b"x" * 100_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert server.send(raw(photo))[0] == 200


def test_request_without_an_answer_in_time_is_refused(gated: GatedModel, photo: bytes) -> None:
    with serving(lambda: gated, limits=RequestLimits(max_seconds=0.3)) as server:
        status, answer, headers = server.request("/predict", "POST", photo)
        assert status == 503 and "No answer within 0.3 seconds" in answer["error"] and headers["retry-after"]
        gated.gate.set()
        assert server.send(raw(photo))[0] == 200


def test_further_requests_are_refused_while_the_queue_is_full(gated: GatedModel, photo: bytes) -> None:
    limits = RequestLimits(max_requests=2)
    with serving(lambda: gated, limits=limits) as server, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(server.send, raw(photo)) for _ in range(2)]
        _wait(lambda: server.metric("serve_requests_in_progress") == 2)
        status, answer, headers = server.request("/predict", "POST", photo)
        assert status == 503 and "2 requests are in progress" in answer["error"]
        assert int(headers["retry-after"]) > 0
        assert server.request("/health")[0] == 200
        gated.gate.set()
        assert [future.result(20)[0] for future in accepted] == [200, 200]
        assert server.send(raw(photo))[0] == 200


def test_request_of_a_client_that_leaves_is_dropped(gated: GatedModel, photo: bytes) -> None:
    with serving(lambda: gated) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.send, raw(photo))
        assert gated.entered.wait(20)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(raw(photo))
            _wait(lambda: len(server.service._batcher._waiting) == 1)  # type: ignore[union-attr]
        _wait(lambda: server.metric("serve_requests_in_progress") == 1)
        gated.gate.set()
        assert first.result(20)[0] == 200
        assert server.send(raw(photo))[0] == 200
        assert gated.batches == [1, 1], "two of three requests"


def test_token_is_required(checkpoint: Path, photo: bytes) -> None:
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None]), token=TOKEN) as server:
        for given in (None, "Bearer wrong", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
            for path, method in (("/predict", "POST"), ("/", "GET"), ("/metrics", "GET"), ("/openapi.json", "GET")):
                headers = {} if given is None else {"Authorization": given}
                status, answer, found = server.request(path, method, photo if method == "POST" else None, headers)
                assert status == 401 and "Authorization: Bearer TOKEN" in answer["error"]
                assert found["www-authenticate"] == "Bearer"
        assert server.request("/health")[0] == 200
        assert server.send(raw(photo), Authorization=f"Bearer {TOKEN}", Host="example.org")[0] == 200
        assert (
            server.service.metrics.registry.get_sample_value(
                "serve_requests_total", {"path": "/predict", "status": "401"}
            )
            == 5
        )


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:8000", 200),
        ("evil.example:8000", 403),
        ("localhost.evil", 403),
    ],
)
def test_without_a_token_other_names_of_this_machine_are_refused(
    host: str, expected: int, server: Server, photo: bytes
) -> None:
    assert server.send(raw(photo), Host=host)[0] == expected


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
        _wait(lambda: server.request("/health")[0] == 200)
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


def test_scans_are_limited_by_the_size_of_the_image(photo: bytes) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).resize((500, 400)).save(file, "JPEG")
    content = many_scans(file.getvalue(), 30)
    check_header(content, RequestLimits(max_megapixels=2))
    check_header(file.getvalue(), RequestLimits(max_megapixels=0.21))
    with pytest.raises(RefusedError, match=r"413: The JPEG has \d\d scans, too many for 500 x 400 pixels\."):
        check_header(content, RequestLimits(max_megapixels=0.21))
