"""What a stranger's file can make this process do: nothing but say what is wrong with it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm  # noqa: F401 - it imports wandb where that is installed, which makes folders: before the watch
import torch

from project import load
from project.classifier import ImageClassifier
from project.cli.main import main
from project.errors import ProjectError
from tests.conftest import SMALL
from tests.integration.hostile import CALLS, CONFIGS, FILES, FLAGS, INERT, NAMES, PLACES, hostile_checkpoints
from tests.integration.watch import watched

MARK = """
import pathlib, torch
pathlib.Path({mark!r}).touch()
class Head(torch.nn.Linear): ...
def function(*arguments): pathlib.Path({mark!r}).touch()
"""
CHECKPOINTS = [*(f"code in {place}" for place in PLACES), *(f"a call of {name}" for name in CALLS), *FILES, *NAMES]


@pytest.fixture
def trap(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a file that is precious, and the strangers' modules within reach of an import."""
    modules = here / "modules"
    (modules / "evil_package").mkdir(parents=True)
    for name in ("evil_marker.py", "evil_package/__init__.py", "evil_package/inside.py"):
        (modules / name).write_text(MARK.format(mark=str(here / "poisoned")))
    (here / "precious").write_text("precious")
    monkeypatch.syspath_prepend(modules)
    yield here
    for name in [name for name in sys.modules if name.startswith("evil")]:
        del sys.modules[name]  # or the next import would be none
    assert (here / "precious").read_text() == "precious"
    assert sorted(path.name for path in here.iterdir()) in (["modules", "precious"], ["bad", "modules", "precious"])


@pytest.fixture(scope="module")
def builders(trained: Path) -> dict[str, Callable[[], bytes]]:
    return hostile_checkpoints(torch.load(trained / "checkpoints/last.ckpt", weights_only=True))


@pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize instance")  # of a default of the classifier, as a head
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused_and_does_nothing(
    name: str, trap: Path, builders: dict[str, Callable[[], bytes]], photos: Path, refused: Callable[[int], str]
) -> None:
    bad = trap / "bad"
    bad.write_bytes(builders[name]())
    verbs: list[list[str]] = [
        ["fit", "--data.root", str(photos), "--trainer.max_epochs", "9"],
        ["validate", "--data.root", str(photos)],
        ["predict", "--data.predict", str(photos)],
    ]
    verb = verbs[CHECKPOINTS.index(name) % len(verbs)]  # all read it by the same function; each sees its share
    with watched() as seen:
        for way in (load, ImageClassifier.load_from_checkpoint):
            with nullcontext() if name in INERT else pytest.raises(ProjectError):
                way(bad)
        code = main([*verb, "--ckpt_path", "bad"])
    assert seen == []
    refused(code)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_refused_and_does_nothing(
    name: str, trap: Path, photos: Path, weights: Path, refused: Callable[[int], str]
) -> None:
    (trap / "bad").write_text(CONFIGS[name].replace("photos", str(photos / "train")))
    # Flags beat files: a file that names the data keeps its own. Without any, no data is all that would be reported.
    names_data = "source" in CONFIGS[name] or "root" in CONFIGS[name]
    data = [] if names_data else ["--data.root", str(photos)]
    with watched() as seen:
        code = main(["fit", *SMALL, "--model.weights", str(weights), *data, "-c", "bad"])
    assert seen == []
    refused(code)


@pytest.mark.parametrize("name", FLAGS)
def test_hostile_flags_are_refused_and_do_nothing(name: str, trap: Path, refused: Callable[[int], str]) -> None:
    with watched() as seen:
        code = main(["fit", *FLAGS[name]])
    assert seen == []
    refused(code)


def sees(doing: Callable[[], Any]) -> bool:
    """Whether the watch sees something."""
    with watched() as seen:
        try:
            doing()
        except Exception as error:
            assert not isinstance(error, NameError)
    return bool(seen)


def test_the_watch_can_see_what_the_tests_above_do_not(trap: Path) -> None:
    import importlib
    import socket
    import subprocess

    before = set(trap.iterdir())
    assert sees(lambda: importlib.import_module("evil_marker"))
    assert (trap / "poisoned").exists()
    (trap / "poisoned").unlink()
    assert sees(lambda: os.system("true"))
    assert sees(lambda: subprocess.Popen(["true"]).wait())
    assert sees(lambda: (trap / "poisoned").touch())
    assert sees(lambda: (trap / "poisoned").unlink())
    assert sees((trap / "poisoned").mkdir) and sees((trap / "poisoned").rmdir)
    assert sees(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))
    assert not sees(lambda: (trap / "precious").read_text())
    assert set(trap.iterdir()) == before
    (trap / "bad").write_bytes(b"cevil_marker\nHead\n.")
    del sys.modules["evil_marker"]
    assert sees(lambda: torch.load(trap / "bad", weights_only=False))
    (trap / "bad").unlink()
    if (trap / "poisoned").exists():
        (trap / "poisoned").unlink()
