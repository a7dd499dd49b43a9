"""TensorBoard's pages in a real browser, over a real run: what a person sees."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_dashboard import fetch, serve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # milliseconds that a page may take, on a busy machine

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        # Without a graphics card, the projector's WebGL is computed.
        flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        started = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    for address in serve(trained.parent):
        fetch(f"{address}/data/plugin/projector/runs")  # its tab is there only once it has been asked
        time.sleep(2)
        yield address


@pytest.fixture
def open_tab(browser: Any, server: str, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """Opens a tab; a picture of it is left in the folder that SCREENSHOTS names, to be looked at."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(WAIT)

    def go(tab: str) -> Any:
        page.goto(f"{server}/#{tab}")
        return page

    yield go
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=str(Path(folder, f"{request.node.name}.png")))
    page.close()


def test_scalars_are_drawn(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("scalars")
    for group in ("train", "val"):
        page.get_by_text(group, exact=True).first.click()
        page.get_by_text(f"tag: {group}/accuracy").first.wait_for()
    page.locator("vz-line-chart2 svg.content").first.wait_for()


def test_images_are_shown(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("images")
    for tag in ("train/input", "val/confusion_counts"):
        page.get_by_text(tag, exact=True).first.wait_for()
    page.wait_for_function(
        "() => { const found = []; const look = root => root.querySelectorAll('*').forEach(each => {"
        " if (each.tagName === 'IMG' && each.naturalWidth > 150) found.push(each);"
        " if (each.shadowRoot) look(each.shadowRoot); }); look(document); return found.length >= 2; }"
    )


def test_hparams_have_a_row_with_the_result(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("hparams")
    page.get_by_text("version_0").first.wait_for()
    page.get_by_text("result/best_accuracy").first.wait_for()
    page.get_by_text("1.0000", exact=True).first.wait_for()  # colours are learnt


def test_the_projector_has_a_point_an_image(open_tab: Callable[[str], Any]) -> None:
    inside = open_tab("projector").frame_locator("iframe").frame_locator("iframe")
    inside.get_by_text(re.compile(r"Points:\s*12")).first.wait_for()
    assert not inside.get_by_text("does not have WebGL").count()
