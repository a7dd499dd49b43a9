"""State of the process is as it was, whatever a command does to it."""

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from project.cli.main import main
from project.runtime.process_state import process_state

LOGGER = "lightning.pytorch.utilities.rank_zero"


@pytest.fixture
def state() -> Callable[[], dict[str, Any]]:
    def look() -> dict[str, Any]:
        return {
            "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
            "socket timeout": socket.getdefaulttimeout(),
            "warning filters": list(warnings.filters),
            "formatwarning": warnings.formatwarning,
            "showwarning": warnings.showwarning,
            "log filters": list(logging.getLogger(LOGGER).filters),
            "log level": logging.getLogger(LOGGER).level,
            "stdout": (sys.stdout, sys.stdout.errors),
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        }

    return look


@pytest.mark.parametrize("fails", [False, True])
def test_all_of_it_is_set_and_restored(state: Callable[[], dict[str, Any]], fails: bool) -> None:
    before = state()
    try:
        with process_state(
            environment={"FROZEN_BACKBONE_TEST": "1"},
            socket_timeout=5.0,
            ignored_warnings=["nonsense"],
            format_warning=lambda message, *_: f"{message}",
            ignored_records={LOGGER: "try installing"},
            log_levels={LOGGER: logging.ERROR},
            stdout_errors="backslashreplace",
        ):
            within = state()
            os.environ["SET_BY_A_LIBRARY"] = "1"
            warnings.warn("nonsense", stacklevel=1)  # an error, if it were not ignored
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert not [name for name in before if name not in ("showwarning", "signals") and before[name] == within[name]]
    assert state() == before


def test_log_messages_are_dropped_by_a_part_of_them(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("project.test")
    with process_state(ignored_records={"project.test": "try installing"}):
        logger.warning("try installing this")
        logger.warning("something else")
    logger.warning("try installing that")
    assert [record.message for record in caplog.records] == ["something else", "try installing that"]


@pytest.mark.parametrize("verb", ["fit", "predict", "check", "wrong"])
def test_main_leaves_the_process_as_it_was(
    run: Path, photos: Path, weights: Path, state: Callable[[], dict[str, Any]], verb: str
) -> None:
    small = ["--model.weights", str(weights), "--data.root", str(photos), "--data.num_workers", "0"]
    saved = ["--ckpt_path", str(run / "checkpoints" / "best.ckpt")]
    lines = {
        "fit": ["fit", "--model.backbone", "resnet18", *small, "--model.image_size", "32", "--trainer.max_epochs", "1"],
        "predict": ["predict", *saved, *small, "--data.predict", str(photos / "test")],
        "check": ["check", "--data.root", str(photos)],
        "wrong": ["fit", "--no_such_flag", "1"],
    }
    before = state()
    assert main(lines[verb]) == {"check": 1, "wrong": 2}.get(verb, 0)
    assert state() == before
