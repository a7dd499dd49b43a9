"""Make the picture and the command output at the top of the README from real runs.

    python -m tests.benchmarks.first_screen --data DIR/clothing10

Trains on ``DIR/{train,val}/CLASS/*.jpg`` with EfficientNet-Lite0, opens TensorBoard and the demo page in Chromium, and
writes ``docs/first_screen.jpg``, at most 300 kB. Requires ``pip install -e ".[demo,test]" playwright`` and Chromium.
Use images whose licence permits a copy: clothing10 is CC0. Then it runs the quickstart and prints the output that
the README shows.
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
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.benchmarks.measure import LITE0, ROOT, progress, run_module
from tests.integration.test_dashboard import fetch

OUT = ROOT / "docs/first_screen.jpg"
LIMIT = 300_000  # bytes
SIZE = {"width": 1000, "height": 1000}
TRAIN = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "0.001", "--trainer.max_epochs", "20")


def started(command: list[str], pattern: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server and return its address, which it prints."""
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if match := re.search(pattern, line):
            return server, match[0]
    raise RuntimeError("".join(lines))


def dashboard(page: Any, runs: Path) -> Image.Image:
    """The confusion matrix and the class scores in TensorBoard."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0"]
    server, address = started([*command, "--load_fast", "false"], r"http://127\.0\.0\.1:\d+")
    try:
        deadline = time.monotonic() + 60
        while b"version_0" not in fetch(f"{address}/data/runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        page.goto(f"{address}/#images")
        page.get_by_text("val/confusion_counts", exact=True).first.wait_for()
        page.wait_for_timeout(5000)
        return Image.open(io.BytesIO(page.screenshot()))
    finally:
        server.terminate()
        server.wait(20)


def demo(page: Any, checkpoint: Path, photograph: Path) -> Image.Image:
    """The demo page with a classified photograph."""
    command = [sys.executable, "-u", "-m", "project", "demo", "--ckpt_path", str(checkpoint), "--port", "0"]
    server, address = started([*command, "--open", "false"], r"http://127\.0\.0\.1:\d+")
    try:
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(str(photograph))
        page.get_by_text("Evidence for").first.wait_for()
        page.wait_for_timeout(3000)
        return Image.open(io.BytesIO(page.screenshot(full_page=True)))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def save(pictures: list[Image.Image]) -> None:
    """Put pictures side by side at one height, in at most ``LIMIT`` bytes."""
    height = 900
    scaled = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    canvas = Image.new("RGB", (sum(picture.width for picture in scaled) + 10 * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        canvas.paste(picture, (left, 0))
        left += picture.width + 10
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
    photograph = sorted(next(iter(sorted((data / "val").iterdir()))).glob("*.jpg"))[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs = Path(folder, "runs")
        options = ("--features.folder", Path(folder, "store"), "--trainer.default_root_dir", runs, "--name", "clothes")
        run_module("project", "fit", *LITE0, *TRAIN, "--data.root", data, *options)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(120_000)
        save([dashboard(page, runs), demo(page, runs / "clothes/version_0/checkpoints/best.ckpt", photograph)])
        browser.close()
    with tempfile.TemporaryDirectory() as runs_folder:
        run = run_module("project", "fit", "-c", "configs/quickstart.yaml", "--trainer.default_root_dir", runs_folder)
    print(run.output)


if __name__ == "__main__":
    main()
