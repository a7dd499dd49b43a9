"""The page to try a classifier: what it answers, what it refuses, and how it ends."""

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
from tests.conftest import draw

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install 'frozen-backbone[demo]'"
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Has gradio found or not, whether it is there or not."""
    find = importlib.util.find_spec

    def pretend(there: bool) -> None:
        found = object() if there else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: found if name == "gradio" else find(name))

    return pretend


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    """Photographs as people have them."""
    found = {"red": draw(tmp_path / "red & <b>.png", (200, 40, 40), 7)}
    found["deep"] = tmp_path / "deep.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (50, 40), dtype=np.uint16)).save(found["deep"])
    found["turned"] = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 40, 3), np.uint8)).save(found["turned"], exif=exif)
    found["broken"] = tmp_path / "broken.jpg"
    found["broken"].write_bytes(found["turned"].read_bytes()[:800])
    return found


def test_without_gradio_it_says_what_to_install(
    run: Path, installed: Callable[[bool], None], refused: Callable[[int], str]
) -> None:
    installed(False)
    code = main(["demo", "--ckpt_path", str(run / "checkpoints/best.ckpt")])
    assert "pip install 'frozen-backbone[demo]'" in refused(code)


def test_a_port_that_is_taken_is_refused_with_the_mend(
    run: Path, installed: Callable[[bool], None], refused: Callable[[int], str]
) -> None:
    installed(True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refused(main(["demo", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--port", port]))
    assert port in said and "--port 0" in said


def test_it_needs_a_checkpoint(here: Path, installed: Callable[[bool], None], refused: Callable[[int], str]) -> None:
    installed(True)
    assert "demo needs a trained model: name it with --ckpt_path" in refused(main(["demo"]))


@pytest.mark.parametrize("kind", ["red", "deep", "turned"])
def test_it_answers_what_load_predicts(kind: str, trained: Path, pictures: dict[str, Path]) -> None:
    checkpoint, file = trained / "checkpoints/best.ckpt", pictures[kind]
    classifier = load(checkpoint)
    found = demo.answer(classifier, Gallery(classifier, data_of(checkpoint)), str(file))
    (expected,) = classifier.predict_proba([file])
    assert found.probabilities == dict(zip(["blue", "green", "red"], expected.tolist(), strict=True))
    best = classifier.predict([file])[0]
    assert f"<h2>{best}, {expected.max():.1%}</h2>" in found.shown
    assert found.shown.count("<img") == 2 + demo.NEAREST
    assert f"speaks for {best}" in found.shown


def test_a_broken_image_is_told_and_no_more(trained: Path, pictures: dict[str, Path]) -> None:
    found = demo.answer(load(trained / "checkpoints/best.ckpt"), None, str(pictures["broken"]))
    assert found.probabilities is None
    assert found.shown.startswith("<h2>broken.jpg cannot be read: ")
    assert str(pictures["broken"].parent) not in found.shown


def test_without_training_images_there_are_none(trained: Path, pictures: dict[str, Path]) -> None:
    found = demo.answer(load(trained / "checkpoints/best.ckpt"), None, str(pictures["red"]))
    assert found.shown.count("<img") == 2
    assert demo.answer(load(trained / "checkpoints/best.ckpt"), None, None) == (None, "")


def test_a_network_without_heat_maps_says_so(
    trained: Path, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise ModelError("There is no heat map of it.")

    monkeypatch.setattr(Classifier, "heat_map", none)
    found = demo.answer(load(trained / "checkpoints/best.ckpt"), None, str(pictures["red"]))
    assert found.shown.count("<img") == 1 and "<p>There is no heat map of it.</p>" in found.shown


def serving(arguments: list[str], folder: Path, log: Path, temporary: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the page, and wait for its address."""
    command = [sys.executable, "-m", "project", "demo", "--open", "false", "--port", "0", *arguments]
    surroundings = {
        **os.environ,
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with log.open("wb") as written:
        process = subprocess.Popen(command, cwd=folder, env=surroundings, stdout=written, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"Demo: (http://127\.0\.0\.1:\d+/)", log.read_text())
        if found:
            return process, found[1]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page of the finished run, as a process of its own. It has to end as it should."""
    folder = tmp_path_factory.mktemp("page")
    log, temporary = folder / "log.txt", folder / "temporary"
    temporary.mkdir()
    process, url = serving(["--ckpt_path", str(trained / "checkpoints/best.ckpt")], folder, log, temporary)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(temporary.iterdir()), "what was dropped is gone with the page"


@needs_gradio
# gradio and what it is made of, in this process: their warnings are not ours.
@pytest.mark.filterwarnings("ignore")
def test_the_page_answers_over_http(page: str, trained: Path, pictures: dict[str, Path]) -> None:
    from gradio_client import Client, handle_file

    client = Client(page, verbose=False, analytics_enabled=False)
    try:
        label, shown = client.predict(handle_file(pictures["red"]), api_name="/look")
        classifier = load(trained / "checkpoints/best.ckpt")
        (expected,) = classifier.predict_proba([pictures["red"]])
        found = {each["label"]: each["confidence"] for each in label["confidences"]}
        assert found == pytest.approx(dict(zip(classifier.classes_, expected.tolist(), strict=True)), abs=1e-5)
        assert "Nearest training images" in shown
        _, shown = client.predict(handle_file(pictures["broken"]), api_name="/look")
        assert "cannot be read" in shown
    finally:
        client.close()


@needs_gradio
def test_the_page_is_on_the_loopback_interface_alone(page: str) -> None:
    port = int(page.rstrip("/").rpartition(":")[2])
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    here = {words[1].partition(":")[0] for words in listening if words[1].endswith(f":{port:04X}") and words[3] == "0A"}
    assert here == {"0100007F"}


@needs_gradio
def test_training_images_that_are_gone_are_told_and_the_page_opens(run: Path, photos: Path, here: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(photos), "gone"))
    (here / "temporary").mkdir()
    process, _ = serving(["--ckpt_path", str(run / "checkpoints/best.ckpt")], here, here / "log", here / "temporary")
    process.terminate()
    assert process.wait(20) == 143
    assert re.search(r"No training images are shown: .*gone.*--data.root PATH shows others", (here / "log").read_text())


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    from playwright.sync_api import Error, sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as drivers:
        try:
            opened = drivers.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@needs_gradio
@pytest.mark.filterwarnings("ignore")  # see above
def test_somebody_drops_a_photograph_and_reads_the_answer(page: str, browser: Any, pictures: dict[str, Path]) -> None:
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page)
    drop(tab, pictures["red"])
    tab.wait_for_selector("h2:has-text('red, ')")
    assert tab.get_by_text("Nearest training images").is_visible()
    assert tab.locator("figure img").count() == 2 + demo.NEAREST
    assert tab.locator("figcaption").nth(1).inner_text() == "What speaks for red"
    assert all(tab.locator("figure img").evaluate_all("all => all.map(each => each.naturalWidth > 0)"))
    assert re.search(r"red\s+\d+%", tab.inner_text("body"))
    tab.get_by_label("Clear").first.click()
    tab.wait_for_selector("h2", state="detached")
    drop(tab, pictures["broken"])
    tab.wait_for_selector("h2:has-text('broken.jpg cannot be read')")
    assert tab.locator("figure").count() == 0
    assert all(url.startswith((page, "data:", "blob:")) for url in asked), "nothing is fetched from elsewhere"


def drop(tab: Any, file: Path) -> None:
    """Drop a file on the page, as a hand with a mouse would."""
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
