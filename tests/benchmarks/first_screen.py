"""Make the picture and the command output at the top of the README from real runs.

    python -m tests.benchmarks.first_screen --data DIR/clothing10

Trains on five classes of ``DIR/{train,val}/CLASS/*.jpg`` with EfficientNet-Lite0, opens TensorBoard and the demo page
in Chromium, and writes ``docs/first_screen.jpg``, at most 300 kB. Requires ``pip install -e ".[demo,test]" playwright``
and Chromium. Use images whose licence permits a copy: clothing10 is CC0. Then it runs the quickstart and prints the
output that the README shows.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from project import load
from project.inference.demo import NEAREST
from project.inference.gallery import Gallery, data_of
from tests.benchmarks.measure import LITE0, ROOT, progress, run_module
from tests.integration.test_dashboard import fetch

OUT = ROOT / "docs/first_screen.jpg"
LIMIT = 300_000  # bytes
#: With five classes, the labels of the confusion matrix are readable at the README's width.
CLASSES = ("longsleeve", "pants", "shirt", "shoes", "t-shirt")
#: Random initial weights: the curve of a solved head is flat.
TRAIN = ("--model.head_init", "random", "--model.optimizer", "AdamW", "--trainer.max_epochs", "20")
#: Width in pixels of the dashboard and of the demo page in the picture; GitHub shows it at about half of its size.
WIDTHS = (860, 920)
GAP, CAPTION = 24, 56  # pixels
#: TensorBoard without panes at its sides.
SETTINGS = """{timeSeriesSettingsPaneOpened: false, sideBarWidthInPercent: 0, scalarSmoothing: 0, ignoreOutliers: false,
stepSelectorEnabled: false}"""
#: Cards as high as their figures.
STYLE = "card-view:has(image-card) {height: 705px !important} card-view:has(scalar-card) {height: 270px !important}"
#: In the order in which TensorBoard shows their cards.
TAGS = "train/loss|val/confusion_counts|val/loss"
HEADER = {"x": 0, "y": 0, "width": 640, "height": 64}  # TensorBoard's name and first tabs


@contextmanager
def served(folder: Path, *command: str) -> Iterator[str]:
    """Start a server in a folder, and yield its address, which it prints."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    lines = []
    try:
        for line in server.stdout:
            lines.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield match[0]
                return
        raise RuntimeError("".join(lines))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def screenshot(target: Any, **options: Any) -> Image.Image:
    """Screenshot of a page or an element."""
    return Image.open(io.BytesIO(target.screenshot(**options))).convert("RGB")


def dashboard(page: Any, folder: Path) -> Image.Image:
    """The start of TensorBoard's header, above its cards of the confusion matrix and of the losses."""
    command = ("tensorboard.main", "--logdir", "runs", "--host", "127.0.0.1", "--port", "0", "--load_fast", "false")
    with served(folder, *command) as address:
        deadline = time.monotonic() + 60
        while b"version_0" not in fetch(f"{address}/data/runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        page.add_init_script(f"localStorage.setItem('_tb_global_settings', JSON.stringify({SETTINGS}))")
        page.set_viewport_size({"width": 1400, "height": 1400})
        page.goto(f"{address}/?tagFilter={quote(TAGS)}#timeseries")
        page.locator("card-view img").wait_for()
        header = screenshot(page, clip=HEADER)
        page.add_style_tag(content=STYLE)
        page.get_by_label("Toggle actual image size").click()
        page.set_viewport_size({"width": 755, "height": 1400})
        page.mouse.move(0, 0)
        page.wait_for_timeout(3000)
        cards = [screenshot(card) for card in page.locator("card-view:visible").all()]
    train_loss, confusion, val_loss = cards
    panel = Image.new("RGB", (confusion.width, header.height + confusion.height + val_loss.height), "white")
    panel.paste(header.getpixel((0, 0)), (0, 0, panel.width, header.height))
    panel.paste(header)
    panel.paste(confusion, (0, header.height))
    panel.paste(train_loss, (0, header.height + confusion.height))
    panel.paste(val_loss, (panel.width - val_loss.width, header.height + confusion.height))
    return panel


def demo(page: Any, folder: Path, checkpoint: str) -> Image.Image:
    """The demo page with the photograph in a folder."""
    with served(folder, "project", "demo", "--ckpt_path", checkpoint, "--port", "0", "--open", "false") as address:
        page.set_viewport_size({"width": 560, "height": 400})
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(str(folder / "photo.jpg"))
        page.get_by_text("Evidence for").first.wait_for()
        page.wait_for_timeout(3000)
        return screenshot(page, full_page=True)


def choose(checkpoint: Path, photographs: list[Path]) -> Path:
    """The photograph with the most central evidence for its class.

    Its probability is at least 90 %, and all of its nearest training images are of its class.
    """
    classifier = load(checkpoint)
    gallery = Gallery(classifier, data_of(checkpoint))
    probabilities, features = classifier.predict_proba(photographs), classifier.features(photographs)
    heat = classifier.heat_map(photographs)
    margin = heat.shape[1] // 5
    center = heat[:, margin:-margin, margin:-margin].sum((1, 2)) / np.maximum(heat.sum((1, 2)), 1e-9)
    for index in np.argsort(-center):
        label = classifier.classes_.index(photographs[index].parent.name)
        nearest = {item.sample.label for item in gallery.nearest(features[[index]], NEAREST)[0]}
        if probabilities[index, label] >= 0.9 and nearest == {label}:
            return photographs[index]
    raise SystemExit("No validation photograph has a probability of 90 % and nearest images of its class only.")


def save(panels: dict[str, Image.Image]) -> None:
    """Put captioned panels side by side, in at most ``LIMIT`` bytes."""
    scaled = [
        panel.resize((width, panel.height * width // panel.width))
        for panel, width in zip(panels.values(), WIDTHS, strict=True)
    ]
    height = max(panel.height for panel in scaled)
    canvas = Image.new("RGB", (sum(WIDTHS) + 3 * GAP, height + CAPTION + GAP), "#eef0f3")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 24)
    left = GAP
    for caption, panel in zip(panels, scaled, strict=True):
        draw.text((left, CAPTION // 2), caption, "#24292f", font, anchor="lm")
        box = (left, CAPTION, left + panel.width, CAPTION + height)
        draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), "white", "#a0a7b0")
        canvas.paste(panel, box[:2])
        left += panel.width + GAP
    for quality in range(90, 30, -5):
        canvas.save(OUT, quality=quality, optimize=True)
        if OUT.stat().st_size <= LIMIT:
            progress(f"{OUT}: {canvas.size}, {OUT.stat().st_size:,} bytes, quality {quality}")
            return
    raise SystemExit(f"{OUT} has more than {LIMIT} bytes.")


def main() -> None:
    """Write the picture, print the output of the quickstart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    data = parser.parse_args().data.resolve()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = Path(temporary)
        for split in ("train", "val"):
            (folder / "clothes" / split).mkdir(parents=True)
            for name in CLASSES:
                (folder / "clothes" / split / name).symlink_to(data / split / name)
        options = ("--features.folder", folder / "store", "--trainer.default_root_dir", folder / "runs")
        run_module("project", "fit", *LITE0, *TRAIN, "--data.root", folder / "clothes", *options)
        checkpoint = "runs/clothes/version_0/checkpoints/best.ckpt"  # relative: no temporary path is shown
        photographs = sorted((folder / "clothes/val").glob("*/*.jpg"))
        shutil.copy(choose(folder / checkpoint, photographs), folder / "photo.jpg")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(device_scale_factor=2)
        tab.set_default_timeout(120_000)
        save(
            {
                "Dashboard: tensorboard --logdir runs": dashboard(tab, folder),
                "Web page: python -m project demo --ckpt_path best.ckpt": demo(tab, folder, checkpoint),
            }
        )
        browser.close()
    with tempfile.TemporaryDirectory() as runs_folder:
        run = run_module("project", "fit", "-c", "configs/quickstart.yaml", "--trainer.default_root_dir", runs_folder)
    print(run.output)


if __name__ == "__main__":
    main()
