"""What a person sees on a terminal, and what a file gets."""

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
from project.runtime.console import Pace, progress_counter

Fit = Callable[..., int]


class Screen:
    """A terminal, and all that was written to it."""

    def __init__(self) -> None:
        self._master, self._slave = pty.openpty()
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.file = os.fdopen(self._slave, "w", encoding="utf-8")

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 65536):
                self._parts.append(part)
        except OSError:  # the other end is closed
            pass

    def close(self) -> str:
        self.file.close()
        self._reader.join()
        os.close(self._master)
        return b"".join(self._parts).decode()


@pytest.fixture
def on_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Runs something on a terminal; gives what was written to it."""

    def run(what: Callable[[], object], columns: int = 80, **environment: str) -> str:
        screen = Screen()
        with monkeypatch.context() as patch:
            for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", screen.file)
            try:
                what()
            finally:
                said = screen.close()
        return said

    yield run


def seen(said: str) -> list[str]:
    """The lines of a terminal's output, those included that were drawn over."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said))


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_shows_a_bar_with_the_time_left_of_the_whole_fit(
    columns: int, fit: Fit, on_screen: Callable[..., str]
) -> None:
    said = on_screen(lambda: fit("--trainer.max_epochs", "20"), columns)
    lines = seen(said)
    bars = [line for line in lines if re.match(r"Epoch \d+/20 +\S+ +\d:\d\d:\d\d left", line)]
    assert bars and "\x1b[" in said
    assert max(len(line) for line in bars) <= columns
    assert any(re.match(r" *stage +parameters", line) for line in lines), "the network by stages"
    assert any("best val/accuracy │" in line for line in lines)
    assert not [line for line in lines if line.startswith("Epoch ") and ":" in line.split(" ")[1]]


def test_a_terminal_shows_a_bar_of_features_that_are_computed(fit: Fit, on_screen: Callable[..., str]) -> None:
    said = on_screen(lambda: fit("--features.folder", "store", "--features.engine", "torch"))
    assert any(re.match(r"Features \S+ .*left \d+/36$", line.strip()) for line in seen(said))
    assert any(line.startswith("Features: 36 of 36 rows to compute") for line in seen(said)), "on a line of its own"


def test_no_color_means_none(fit: Fit, on_screen: Callable[..., str]) -> None:
    said = on_screen(lambda: fit(), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|9[0-7])m", said)


def test_a_file_gets_a_few_plain_lines(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", "100") == 0
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\r", "\b", "━"}
    epochs = [line for line in out.splitlines() if line.startswith("Epoch ")]
    assert 20 <= len(epochs) <= 42 and epochs[-1].startswith("Epoch 100/100: val/accuracy ")
    assert all(" left" in line for line in epochs[:-1])
    assert "  best val/accuracy: " in out and len((out + err).splitlines()) < 80


def test_no_bar_means_no_lines_either(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.enable_progress_bar", "false") == 0
    assert "Epoch" not in capsys.readouterr().out


def test_a_dumb_terminal_gets_lines(fit: Fit, on_screen: Callable[..., str]) -> None:
    said = on_screen(lambda: fit(), TERM="dumb")
    assert "Epoch 1/1: val/accuracy" in said and "\x1b" not in said


def test_the_other_verbs_have_a_bar_too(run: object, photos: object, on_screen: Callable[..., str]) -> None:
    ckpt = f"{run}/checkpoints/best.ckpt"
    flags = ["--data.num_workers", "0", "--ckpt_path", ckpt]
    said = on_screen(lambda: main(["validate", "--data.root", str(photos), *flags]))
    assert any(re.match(r"Validating .*left", line) for line in seen(said))
    said = on_screen(lambda: main(["predict", "--data.predict", f"{photos}/test", *flags]))
    assert any(re.match(r"Predicting .*left", line) for line in seen(said))
    assert any(line.strip() == "Predictions: predictions.csv" for line in seen(said))


def test_time_left_is_right_from_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace()
    pace.count(0, 1000)
    now += 30  # an engine is built
    pace.count(0, 1000)
    assert pace.left is None
    now += 1
    for done in (10, 20):  # two threads hand in at once
        pace.count(done, 1000)
    assert pace.left == pytest.approx(49)
    now += 1
    assert pace.left == pytest.approx(48), "it goes on by itself"


def test_what_was_done_before_does_not_count_for_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace()
    pace.count(900, 1000)
    now += 1
    pace.count(910, 1000)
    assert pace.left == pytest.approx(9)


def test_what_takes_long_says_so_in_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with progress_counter("Reading") as count:
        for done in range(3601):
            count(done, 3600)
            now += 1
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 10 and lines[0] == "Reading: 30 of 3,600, 0:59:30 left"
