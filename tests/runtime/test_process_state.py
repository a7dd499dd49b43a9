"""Process-wide state is restored after a command."""

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
from tests.conftest import BACKBONE

LOGGER = "lightning.pytorch.utilities.rank_zero"


@pytest.fixture
def state() -> Callable[[], dict[str, Any]]:
    """Reads the process-wide state that commands may change."""

    def read() -> dict[str, Any]:
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

    return read


@pytest.mark.parametrize("fails", [False, True])
def test_all_state_is_set_and_restored(state: Callable[[], dict[str, Any]], fails: bool) -> None:
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
            inside = state()
            os.environ["SET_BY_A_LIBRARY"] = "1"
            warnings.warn("nonsense", stacklevel=1)  # pytest raises it unless it is ignored
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert not [name for name in before if name not in ("showwarning", "signals") and before[name] == inside[name]]
    assert state() == before


def test_log_messages_are_dropped_by_substring(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("project.test")
    with process_state(ignored_records={"project.test": "try installing"}):
        logger.warning("try installing this")
        logger.warning("something else")
    logger.warning("try installing that")
    assert [record.message for record in caplog.records] == ["something else", "try installing that"]


@pytest.mark.parametrize("verb", ["fit", "predict", "check", "user error"])
def test_main_restores_the_process_state(
    run: Path, photos: Path, weights: Path, state: Callable[[], dict[str, Any]], verb: str
) -> None:
    small = ["--model.weights", str(weights), "--data.root", str(photos), "--data.num_workers", "0"]
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "best.ckpt")]
    commands = {
        "fit": ["fit", "--model.backbone", BACKBONE, *small, "--model.image_size", "32", "--trainer.max_epochs", "1"],
        "predict": ["predict", *checkpoint, *small, "--data.predict", str(photos / "test")],
        "check": ["check", "--data.root", str(photos)],
        "user error": ["fit", "--no_such_flag", "1"],
    }
    before = state()
    assert main(commands[verb]) == {"check": 1, "user error": 2}.get(verb, 0)
    assert state() == before
