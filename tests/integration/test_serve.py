"""The command ``serve``: refused flags, answers, and shutdown."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from project import load
from project.cli.main import main
from project.inference.serving.serve import listen, read_token

TOKEN = "0123456789abcdef"


@pytest.fixture
def serve(run: Path) -> Callable[..., int]:
    """Runs ``serve`` with the checkpoint of a finished run."""
    return lambda *flags: main(["serve", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--port", "0", *flags])


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    (tmp_path / "token").write_text(TOKEN + "\n")
    return str(tmp_path / "token")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 accepts other machines, so it needs a token: --token_file FILE"),
        (["--host", "::"], "--host :: accepts other machines"),
        (["--host", "192.0.2.1", "--token_file", "{token}"], "--host 192.0.2.1 --port 0: "),
        (["--host", "127..0.1"], "--host 127..0.1: it is not a valid name. Use an address of this machine."),
        (["--token_file", "no"], "--token_file no cannot be read"),
        (["--token_file", "{short}"], "must contain a token of at least 16 ASCII characters"),
        (["--port", "70000"], "--port must be between 0 (any free port) and 65535, not 70000."),
        (["--max_megabytes", "0"], "--max_megabytes must be more than 0, not 0.0."),
        (["--max_megapixels", "200"], "--max_megapixels must be at most 178: Pillow opens no larger image."),
        (["--max_requests", "-1"], "--max_requests must be more than 0, not -1."),
        (["--batch_size", "0"], "--batch_size must be at least 1, not 0."),
        (["--batch_wait", "-1"], "--batch_wait must be from 0 to 1000 milliseconds, not -1."),
        (["--coverage", "0.9999"], "--coverage"),
        (["--features.precision", "int8"], "features.precision int8 needs training images"),
        (["--model.image_size", "48"], "--model.image_size cannot be set for serve"),
        (["--data.batch_size", "8"], "--data.batch_size has no effect, because serve reads no data."),
        (["--data.root", "photos"], "--data.root has no effect, because serve reads no data."),
        (["--model.weights", "no.pth"], "no.pth"),
    ],
)
def test_wrong_flags_are_refused_by_name(
    flags: list[str],
    text: str,
    serve: Callable[..., int],
    refused: Callable[[int], str],
    token_file: str,
    tmp_path: Path,
) -> None:
    (tmp_path / "short").write_text("secret")
    known = {"token": token_file, "short": str(tmp_path / "short")}
    assert text in refused(serve(*(flag.format(**known) for flag in flags)))


def test_missing_checkpoint_is_refused(here: Path, refused: Callable[[int], str]) -> None:
    assert "serve needs a trained model: --ckpt_path" in refused(main(["serve"]))
    assert "There is no checkpoint no.ckpt" in refused(main(["serve", "--ckpt_path", "no.ckpt"]))


def test_data_selects_the_run_of_an_alias(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--ckpt_path", "best", "--data.root", str(photos), "--port", "0", "--coverage", "0.9999"]
    assert "--coverage" in refused(main(["serve", *flags])), "of the checkpoint that was found"
    assert "--data.batch_size has no effect" in refused(main(["serve", *flags, "--data.batch_size", "8"]))


def test_port_in_use_is_refused(serve: Callable[..., int], refused: Callable[[int], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"--port {port}: " in refused(serve("--port", port))


def test_missing_package_is_reported_with_the_install_command(
    serve: Callable[..., int], refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "fastapi" else find(name))
    assert "serve requires fastapi. Install: pip install 'frozen-backbone[serve]'" in refused(serve())


def test_damaged_checkpoint_ends_the_command(
    run: Path, serve: Callable[..., int], refused: Callable[[int], str]
) -> None:
    checkpoint = run / "checkpoints/best.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    assert "damaged" in refused(serve())


def test_only_the_loopback_interface_needs_no_token(token_file: str) -> None:
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        assert read_token(host, None) is None
    assert read_token("0.0.0.0", token_file) == TOKEN
    with listen("127.0.0.1", 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """The command in a process of its own: the process, its port and its output, once it is ready."""
    log = folder / "log.txt"
    command = [sys.executable, "-m", "project", "serve", "--port", "0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    try:
        deadline = time.monotonic() + 90
        while "ready after" not in log.read_text():
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
        match = re.search(r"Serve: http://[^:]+:(\d+)/predict", log.read_text())
        assert match
        yield process, int(match[1]), log
    finally:
        process.kill()
        process.wait()


def post(port: int, content: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", content, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_sigterm_finishes_accepted_requests(run: Path, here: Path, photos: Path) -> None:
    checkpoint, photo = run / "checkpoints/best.ckpt", photos / "test/green/0.png"
    flags = ["--ckpt_path", str(checkpoint), "--features.engine", "torch", "--false_alarms", "0.5"]
    with started(here, *flags, "--batch_wait", "1000") as (process, port, log):
        (expected,) = load(checkpoint).answer([photo], false_alarms=0.5)
        results: list[tuple[int, Any]] = []
        thread = threading.Thread(target=lambda: results.append(post(port, photo.read_bytes())))
        thread.start()
        time.sleep(0.5)  # the request waits for others
        process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert process.wait(30) == 143, log.read_text()
        assert "Stopped by SIGTERM" in log.read_text() and "Traceback" not in log.read_text()
        with pytest.raises(ConnectionError):
            post(port, photo.read_bytes())
    ((status, answer),) = results
    assert status == 200 and answer["class"] == expected.label and answer["known"] == expected.known
    assert answer["calibrated_probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_other_addresses_need_the_token(run: Path, here: Path, photos: Path, token_file: str) -> None:
    shutil.copy(run / "checkpoints/best.ckpt", here / "second.ckpt")
    paths = [str(run / "checkpoints/best.ckpt"), "second.ckpt"]
    flags = [flag for path in paths for flag in ("--ckpt_path", path)]
    with started(here, *flags, "--host", "0.0.0.0", "--token_file", token_file) as (process, port, log):
        photo = (photos / "test/green/0.png").read_bytes()
        assert post(port, photo)[0] == 401
        status, answer = post(port, photo, Authorization=f"Bearer {TOKEN}")
        assert status == 200 and list(answer) == ["photos", "second"]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, log.read_text()
        assert TOKEN not in log.read_text()
