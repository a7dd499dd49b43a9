"""TensorBoard's pages of a real run, in a real browser."""

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
TIMEOUT_MS = 60_000  # a busy machine is slow

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Software rendering: the projector needs WebGL.
        flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    for url in serve(trained.parent):
        fetch(f"{url}/data/plugin/projector/runs")  # TensorBoard lists the projector only after this request
        time.sleep(2)
        yield url


@pytest.fixture
def open_tab(browser: Any, server: str, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """Opens a tab of TensorBoard. Set SCREENSHOTS to a folder to save a screenshot of each test."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)

    def go_to(tab: str) -> Any:
        page.goto(f"{server}/#{tab}")
        return page

    yield go_to
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)
        page.screenshot(path=str(Path(folder, f"{request.node.name}.png")))
    page.close()


def test_scalars_tab_shows_line_charts(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("scalars")
    for group in ("train", "val"):
        page.get_by_text(group, exact=True).first.click()
        page.get_by_text(f"tag: {group}/accuracy").first.wait_for()
    page.locator("vz-line-chart2 svg.content").first.wait_for()


def test_images_tab_shows_figures(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("images")
    for tag in ("train/input", "val/confusion_counts"):
        page.get_by_text(tag, exact=True).first.wait_for()
    page.wait_for_function(
        "() => { const images = []; const search = root => root.querySelectorAll('*').forEach(element => {"
        " if (element.tagName === 'IMG' && element.naturalWidth > 150) images.push(element);"
        " if (element.shadowRoot) search(element.shadowRoot); }); search(document); return images.length >= 2; }"
    )


def test_hparams_tab_shows_the_result(open_tab: Callable[[str], Any]) -> None:
    page = open_tab("hparams")
    page.get_by_text("version_0").first.wait_for()
    page.get_by_text("result/best_accuracy").first.wait_for()
    page.get_by_text("1.0000", exact=True).first.wait_for()  # the accuracy


def test_projector_tab_has_one_point_per_image(open_tab: Callable[[str], Any]) -> None:
    frame = open_tab("projector").frame_locator("iframe").frame_locator("iframe")
    frame.get_by_text(re.compile(r"Points:\s*12")).first.wait_for()
    assert not frame.get_by_text("does not have WebGL").count()
