"""Console output on a terminal and in a file."""

import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from project.cli.main import main
from project.runtime import console
from project.runtime.console import EtaEstimator, progress_counter

Fit = Callable[..., int]


class PseudoTerminal:
    """A pseudo-terminal that records its output."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.file = os.fdopen(self._slave, "w", encoding="utf-8")

    def _read(self) -> None:
        try:
            while chunk := os.read(self._master, 65536):
                self._chunks.append(chunk)
        except OSError:  # the other end is closed
            pass

    def close(self) -> str:
        self.file.close()
        self._reader.join()
        os.close(self._master)
        return b"".join(self._chunks).decode()


@pytest.fixture
def on_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Runs a function on a terminal; returns its output."""

    def run(function: Callable[[], object], columns: int = 80, **environment: str) -> str:
        terminal = PseudoTerminal()
        with monkeypatch.context() as patch:
            for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", terminal.file)
            try:
                function()
            finally:
                output = terminal.close()
        return output

    yield run


def drawn_lines(output: str) -> list[str]:
    """All lines of a terminal's output, including redrawn ones, without escape sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output))


@pytest.mark.parametrize("columns", [40, 80])
def test_terminal_shows_a_bar_with_the_time_left_of_the_fit(
    columns: int, fit: Fit, on_screen: Callable[..., str]
) -> None:
    output = on_screen(lambda: fit("--trainer.max_epochs", "20"), columns)
    lines = drawn_lines(output)
    bars = [line for line in lines if re.match(r"Epoch \d+/20 +\S+ +\d:\d\d:\d\d left", line)]
    assert bars and "\x1b[" in output
    assert max(len(line) for line in bars) <= columns
    assert any(re.match(r" *stage +parameters", line) for line in lines), "the table of stages"
    assert any("best val/accuracy │" in line for line in lines)
    assert not [line for line in lines if line.startswith("Epoch ") and ":" in line.split(" ")[1]]


def test_terminal_shows_a_bar_for_feature_extraction(fit: Fit, on_screen: Callable[..., str]) -> None:
    output = on_screen(lambda: fit("--features.folder", "store", "--features.engine", "torch"))
    assert any(re.match(r"Features \S+ .*left \d+/36$", line.strip()) for line in drawn_lines(output))
    assert any(line.startswith("Features: 36 of 36 rows to compute") for line in drawn_lines(output)), (
        "it is on its own line"
    )


def test_no_color_disables_colours(fit: Fit, on_screen: Callable[..., str]) -> None:
    output = on_screen(lambda: fit(), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])m", output)


def test_file_output_is_a_few_plain_lines(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", "100") == 0
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\r", "\b", "━"}
    epochs = [line for line in out.splitlines() if line.startswith("Epoch ")]
    assert 20 <= len(epochs) <= 42 and epochs[-1].startswith("Epoch 100/100: val/accuracy ")
    assert all(" left" in line for line in epochs[:-1])
    assert "  best val/accuracy: " in out and len((out + err).splitlines()) < 80


def test_disabled_progress_bar_prints_no_lines(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.enable_progress_bar", "false") == 0
    assert "Epoch" not in capsys.readouterr().out


def test_dumb_terminal_gets_lines(fit: Fit, on_screen: Callable[..., str]) -> None:
    output = on_screen(lambda: fit(), TERM="dumb")
    assert "Epoch 1/1: val/accuracy" in output and "\x1b" not in output


def test_validate_and_predict_show_a_bar(run: object, photos: object, on_screen: Callable[..., str]) -> None:
    ckpt = f"{run}/checkpoints/best.ckpt"
    flags = ["--data.num_workers", "0", "--ckpt_path", ckpt]
    output = on_screen(lambda: main(["validate", "--data.root", str(photos), *flags]))
    assert any(re.match(r"Validating .*left", line) for line in drawn_lines(output))
    output = on_screen(lambda: main(["predict", "--data.predict", f"{photos}/test", *flags]))
    assert any(re.match(r"Predicting .*left", line) for line in drawn_lines(output))
    assert any(line.strip() == "Predictions: 12 images: predictions.csv" for line in drawn_lines(output))


def test_time_left_excludes_the_startup_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    eta = EtaEstimator()
    eta.count(0, 1000)
    now += 30  # startup, such as building an engine
    eta.count(0, 1000)
    assert eta.seconds_left is None
    now += 1
    for done in (10, 20):  # two threads report at once
        eta.count(done, 1000)
    assert eta.seconds_left == pytest.approx(49)
    now += 1
    assert eta.seconds_left == pytest.approx(48), "it decreases between counts"


def test_speed_excludes_items_finished_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    eta = EtaEstimator()
    eta.count(900, 1000)
    now += 1
    eta.count(910, 1000)
    assert eta.seconds_left == pytest.approx(9)


def test_long_task_prints_progress_lines_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress_counter("Reading") as count:
        for done in range(3601):
            count(done, 3600)
            now += 1
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 10 and lines[0] == "Reading: 30 of 3,600, 0:59:30 left"
