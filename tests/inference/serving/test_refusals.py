"""Requests that are refused: hostile uploads, limits, access."""

import contextlib
import io
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from project.inference.many_tasks import ManyTasks
from project.inference.serving.limits import MAX_MEGAPIXELS, RefusedError, RequestLimits
from project.inference.serving.served_model import ServedModel
from project.inference.serving.uploads import check_header
from project.runtime.system import cores
from tests.benchmarks.load_client import BOUNDARY, form, many_scans, png, raw
from tests.inference.serving.running_server import GatedModel, Server, serving, wait_for

TOKEN = "a-secret-of-sixteen"


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


def icon(content: bytes) -> bytes:
    """An ICO file that states 16 x 16 pixels, and contains a PNG."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def test_images_that_contain_images_of_another_size_are_refused(server: Server) -> None:
    status, answer = server.send(raw(icon(png(9_000, 9_000))))
    assert status == 422 and "format ICO" in answer["error"]


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


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_connection_without_a_request_is_closed(before: bytes, checkpoint: Path, photo: bytes) -> None:
    limits = RequestLimits(max_seconds=0.5)
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None]), limits=limits) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(before)
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < 10:
                    connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: " if time.monotonic() - began < 0.1 else b"x")
                    time.sleep(0.1)
            assert time.monotonic() - began < 5
        assert server.send(raw(photo))[0] == 200


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
        wait_for(lambda: server.metric("serve_requests_in_progress") == 2)
        status, answer, headers = server.request("/predict", "POST", photo)
        assert status == 503 and "2 requests are in progress" in answer["error"]
        assert int(headers["retry-after"]) > 0
        assert server.request("/health")[0] == 200
        gated.gate.set()
        assert [future.result(20)[0] for future in accepted] == [200, 200]
        assert server.send(raw(photo))[0] == 200


def test_uploads_given_up_are_not_kept_while_slow_images_are_decoded(checkpoint: Path, photo: bytes) -> None:
    class SlowDecoding(ServedModel):
        def prepare(self, content: bytes) -> list[torch.Tensor]:
            assert gate.wait(20)
            return super().prepare(content)

    gate = threading.Event()
    limits = RequestLimits(max_seconds=0.3, max_requests=4 * cores() + 8)
    uploads = 4 * cores() + 8
    with serving(lambda: SlowDecoding(ManyTasks.load([checkpoint]), [None]), limits=limits) as server:
        try:
            with ThreadPoolExecutor(uploads) as pool:
                statuses = {answer[0] for answer in pool.map(server.send, [raw(photo)] * uploads)}
            assert statuses == {503}
            assert server.service._decoders._work_queue.qsize() <= cores()
        finally:
            gate.set()
        wait_for(lambda: server.send(raw(photo))[0] == 200)


def test_request_of_a_client_that_leaves_is_dropped(gated: GatedModel, photo: bytes) -> None:
    with serving(lambda: gated) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.send, raw(photo))
        assert gated.entered.wait(20)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(raw(photo))
            wait_for(lambda: len(server.service._batcher._waiting) == 1)  # type: ignore[union-attr]
        wait_for(lambda: server.metric("serve_requests_in_progress") == 1)
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


def test_pillow_opens_the_largest_image_that_can_be_permitted() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS - 1e6 < MAX_MEGAPIXELS * 1e6 <= 2 * Image.MAX_IMAGE_PIXELS


def test_scans_are_limited_by_the_size_of_the_image(photo: bytes) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).resize((500, 400)).save(file, "JPEG")
    content = many_scans(file.getvalue(), 30)
    check_header(content, RequestLimits(max_megapixels=2))
    check_header(file.getvalue(), RequestLimits(max_megapixels=0.21))
    with pytest.raises(RefusedError, match=r"413: The JPEG has \d\d scans, too many for 500 x 400 pixels\."):
        check_header(content, RequestLimits(max_megapixels=0.21))
