"""The demo page: results, refused requests, and shutdown."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from project import Classifier, load
from project.cli.main import main
from project.errors import ModelError
from project.inference import demo
from project.inference.gallery import Gallery, data_of
from tests.conftest import BACKBONE, COLOURS, draw

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install 'frozen-backbone[demo]'"
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretends that gradio is installed, or that it is not."""
    find = importlib.util.find_spec

    def pretend(available: bool) -> None:
        spec = object() if available else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: spec if name == "gradio" else find(name))

    return pretend


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Image files as users upload them."""
    files = {"red": draw(tmp_path / "red & <b>.png", (200, 40, 40), 7)}
    files["16-bit"] = tmp_path / "16-bit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (50, 40), dtype=np.uint16)).save(files["16-bit"])
    files["rotated"] = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 40, 3), np.uint8)).save(files["rotated"], exif=exif)
    files["broken"] = tmp_path / "broken.jpg"
    files["broken"].write_bytes(files["rotated"].read_bytes()[:800])
    return files


def test_missing_gradio_is_reported_with_the_install_command(
    run: Path, installed: Callable[[bool], None], refused: Callable[[int], str]
) -> None:
    installed(False)
    code = main(["demo", "--ckpt_path", str(run / "checkpoints/best.ckpt")])
    assert "pip install 'frozen-backbone[demo]'" in refused(code)


def test_port_in_use_is_refused_with_a_fix(
    run: Path, installed: Callable[[bool], None], refused: Callable[[int], str]
) -> None:
    installed(True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = refused(main(["demo", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--port", port]))
    assert port in message and "--port 0" in message


def test_missing_checkpoint_is_refused(
    here: Path, installed: Callable[[bool], None], refused: Callable[[int], str]
) -> None:
    installed(True)
    assert "demo needs a trained model: --ckpt_path" in refused(main(["demo"]))


@pytest.mark.parametrize("kind", ["red", "16-bit", "rotated"])
def test_result_equals_the_prediction_of_load(kind: str, trained: Path, files: dict[str, Path]) -> None:
    checkpoint, file = trained / "checkpoints/best.ckpt", files[kind]
    classifier = load(checkpoint)
    result = demo.classify_file(classifier, Gallery(classifier, data_of(checkpoint)), str(file))
    (expected,) = classifier.predict_proba([file])
    assert result.probabilities == dict(zip(["blue", "green", "red"], expected.tolist(), strict=True))
    best = classifier.predict([file])[0]
    assert f"<h2>{best}, {expected.max():.1%}</h2>" in result.html
    assert result.html.count("<img") == 2 + demo.NEAREST
    evidence = "Evidence for" if classifier.heat_map([file]).any() else "No region supports"
    assert f"{evidence} {best} (Grad-CAM)" in result.html


def test_calibrated_answers_are_those_of_load(calibrated: Path, here: Path) -> None:
    classifier = load(calibrated)
    lines = set()
    for number, colour in enumerate([*COLOURS.values(), (250, 250, 250), (110, 110, 110)]):
        file = draw(here / f"{number}.png", colour, 5000 + number)
        (answer,) = classifier.answer([file], coverage=0.95, max_error=0.02, false_alarms=0.05)
        page = demo.classify_file(classifier, None, str(file)).html
        known, answered = ("yes" if value else "no" for value in (answer.known, answer.answered))
        expected = [
            f"Calibrated probability: {answer.probability:.1%}",
            f"Known: {known} (at most 5% false alarms)",
            f"Set: {', '.join(answer.classes)} (95% of such sets contain the right class)",
            f"Answered: {answered} (at most 2% of such answers are wrong)",
        ]
        assert re.findall("<li>(.*?)</li>", page) == expected
        lines.update(expected)
    assert {line.partition(" (")[0] for line in lines} >= {"Known: yes", "Known: no", "Answered: yes", "Answered: no"}


def test_without_calibrated_answers_none_are_shown(trained: Path, files: dict[str, Path]) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    # 12 calibration images are too few for any limit.
    page = demo.classify_file(classifier, None, str(files["red"])).html
    assert re.findall("<li>(.*?)</li>", page)[0].startswith("Calibrated probability: ")
    classifier.model.answers = None
    assert "<li>" not in demo.classify_file(classifier, None, str(files["red"])).html


def test_corrupt_image_is_reported_without_its_path(trained: Path, files: dict[str, Path]) -> None:
    result = demo.classify_file(load(trained / "checkpoints/best.ckpt"), None, str(files["broken"]))
    assert result.probabilities is None
    assert result.html.startswith("<h2>broken.jpg cannot be read: ")
    assert str(files["broken"].parent) not in result.html


def test_without_a_gallery_no_neighbours_are_shown(trained: Path, files: dict[str, Path]) -> None:
    result = demo.classify_file(load(trained / "checkpoints/best.ckpt"), None, str(files["red"]))
    assert result.html.count("<img") == 2
    assert demo.classify_file(load(trained / "checkpoints/best.ckpt"), None, None) == (None, "")


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/birds/version_2/checkpoints/best.ckpt", "birds/version_2"), ("models/birds.ckpt", "birds")],
)
def test_title_names_the_run_without_its_path(path: str, name: str, here: Path) -> None:
    assert demo._run_name(path) == demo._run_name(str(here / path)) == name


def test_missing_heat_map_is_reported(trained: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModelError("No heat map.")

    monkeypatch.setattr(Classifier, "heat_map", fail)
    result = demo.classify_file(load(trained / "checkpoints/best.ckpt"), None, str(files["red"]))
    assert result.html.count("<img") == 1 and "<p>No heat map.</p>" in result.html


def start_page(arguments: list[str], folder: Path, log: Path, temporary: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the page and wait for its URL."""
    command = [sys.executable, "-m", "project", "demo", "--open", "false", "--port", "0", *arguments]
    environment = {
        **os.environ,
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        match = re.search(r"Demo: (http://127\.0\.0\.1:\d+/)", log.read_text())
        if match:
            return process, match[1]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the page of a finished run, served by another process that must shut down cleanly."""
    folder = tmp_path_factory.mktemp("page")
    log, temporary = folder / "log.txt", folder / "temporary"
    temporary.mkdir()
    process, url = start_page(["--ckpt_path", str(trained / "checkpoints/best.ckpt")], folder, log, temporary)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(temporary.iterdir()), "uploads are deleted with the page"


@needs_gradio
# Warnings of gradio and its dependencies are not ours.
@pytest.mark.filterwarnings("ignore")
def test_page_serves_results_over_http(page: str, trained: Path, files: dict[str, Path]) -> None:
    from gradio_client import Client, handle_file

    client = Client(page, verbose=False, analytics_enabled=False)
    try:
        label, details = client.predict(handle_file(files["red"]), api_name="/look")
        classifier = load(trained / "checkpoints/best.ckpt")
        (expected,) = classifier.predict_proba([files["red"]])
        probabilities = {item["label"]: item["confidence"] for item in label["confidences"]}
        assert probabilities == pytest.approx(dict(zip(classifier.classes_, expected.tolist(), strict=True)), abs=1e-5)
        assert "Nearest training images" in details
        _, details = client.predict(handle_file(files["broken"]), api_name="/look")
        assert "cannot be read" in details
    finally:
        client.close()


@needs_gradio
def test_page_listens_on_the_loopback_interface_only(page: str) -> None:
    port = int(page.rstrip("/").rpartition(":")[2])
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    # Columns 1 and 3: local address and state, 0A for LISTEN.
    addresses = {
        columns[1].partition(":")[0]
        for columns in sockets
        if columns[1].endswith(f":{port:04X}") and columns[3] == "0A"
    }
    assert addresses == {"0100007F"}


@needs_gradio
def test_missing_training_images_are_reported_and_the_page_opens(run: Path, photos: Path, here: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(photos), "gone"))
    (here / "temporary").mkdir()
    process, _ = start_page(["--ckpt_path", str(run / "checkpoints/best.ckpt")], here, here / "log", here / "temporary")
    process.terminate()
    assert process.wait(20) == 143
    assert re.search(r"Training images are not available: .*gone.*--data\.root PATH", (here / "log").read_text())


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    from playwright.sync_api import Error, sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@needs_gradio
@pytest.mark.filterwarnings("ignore")  # see above
def test_dropped_image_shows_its_result_in_a_browser(page: str, browser: Any, files: dict[str, Path]) -> None:
    tab = browser.new_page()
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page)
    drop(tab, files["red"])
    tab.wait_for_selector("h2:has-text('red, ')")
    assert tab.title() == tab.locator("h1").inner_text() == f"photos/version_0: {BACKBONE}, 3 classes"
    assert tab.get_by_text("Nearest training images").is_visible()
    assert tab.locator("figure img").count() == 2 + demo.NEAREST
    assert tab.locator("figcaption").nth(1).inner_text() == "Evidence for red (Grad-CAM)"
    assert all(tab.locator("figure img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))
    assert re.search(r"red\s+\d+%", tab.inner_text("body"))
    tab.get_by_label("Clear").first.click()
    tab.wait_for_selector("h2", state="detached")
    drop(tab, files["broken"])
    tab.wait_for_selector("h2:has-text('broken.jpg cannot be read')")
    assert tab.locator("figure").count() == 0
    assert all(url.startswith((page, "data:", "blob:")) for url in requests), "the page makes no external requests"


def drop(tab: Any, file: Path) -> None:
    """Drop a file on the page."""
    tab.wait_for_selector("button:has-text('Drop File Here')")
    data = tab.evaluate_handle(
        """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name));
            return data;
        }""",
        [file.name, list(file.read_bytes())],
    )
    tab.dispatch_event("button:has-text('Drop File Here')", "drop", {"dataTransfer": data})
