"""Malicious checkpoints, configs and flags are refused without side effects."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm  # noqa: F401 - early, because it imports wandb, which creates folders when it is installed
import torch

from project import load
from project.classifier import ImageClassifier
from project.cli.main import main
from project.errors import ProjectError
from tests.conftest import SMALL
from tests.integration.audit_hook import record_side_effects
from tests.integration.hostile import (
    CONFIGS,
    FILES,
    FLAGS,
    HYPER_PARAMETERS,
    INERT_IN_LOAD,
    INJECTIONS,
    PAYLOADS,
    hostile_checkpoints,
)

EVIL_MODULE = """
import pathlib, torch
pathlib.Path({mark!r}).touch()
class Head(torch.nn.Linear): ...
def function(*arguments): pathlib.Path({mark!r}).touch()
"""
CHECKPOINTS = [
    *(f"code in {place}" for place in INJECTIONS),
    *(f"call of {name}" for name in PAYLOADS),
    *FILES,
    *HYPER_PARAMETERS,
]


@pytest.fixture
def sandbox(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a file ``precious`` and importable malicious modules; unchanged after the test."""
    modules = here / "modules"
    (modules / "evil_package").mkdir(parents=True)
    for name in ("evil_marker.py", "evil_package/__init__.py", "evil_package/inside.py"):
        (modules / name).write_text(EVIL_MODULE.format(mark=str(here / "poisoned")))
    (here / "precious").write_text("precious")
    monkeypatch.syspath_prepend(modules)
    yield here
    for name in [name for name in sys.modules if name.startswith("evil")]:
        del sys.modules[name]  # so that the next test imports it anew
    assert (here / "precious").read_text() == "precious"
    assert sorted(path.name for path in here.iterdir()) in (["modules", "precious"], ["bad", "modules", "precious"])


@pytest.fixture(scope="module")
def builders(trained: Path) -> dict[str, Callable[[], bytes]]:
    return hostile_checkpoints(torch.load(trained / "checkpoints/last.ckpt", weights_only=True))


@pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize instance")  # a default of ImageClassifier, used as a head
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint_is_refused_without_side_effects(
    name: str, sandbox: Path, builders: dict[str, Callable[[], bytes]], photos: Path, refused: Callable[[int], str]
) -> None:
    bad = sandbox / "bad"
    bad.write_bytes(builders[name]())
    verbs: list[list[str]] = [
        ["fit", "--data.root", str(photos), "--trainer.max_epochs", "9"],
        ["validate", "--data.root", str(photos)],
        ["predict", "--data.predict", str(photos)],
    ]
    verb = verbs[CHECKPOINTS.index(name) % len(verbs)]  # one each, because all verbs share the same reader
    with record_side_effects() as seen:
        for load_function in (load, ImageClassifier.load_from_checkpoint):
            with nullcontext() if name in INERT_IN_LOAD else pytest.raises(ProjectError):
                load_function(bad)
        code = main([*verb, "--ckpt_path", "bad"])
    assert seen == []
    refused(code)


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_config_is_refused_without_side_effects(
    name: str, sandbox: Path, photos: Path, weights: Path, refused: Callable[[int], str]
) -> None:
    (sandbox / "bad").write_text(CONFIGS[name].replace("photos", str(photos / "train")))
    # Without data, "no data" would be the only error. A flag would override the data that the config names.
    names_data = "source" in CONFIGS[name] or "root" in CONFIGS[name]
    data = [] if names_data else ["--data.root", str(photos)]
    with record_side_effects() as seen:
        code = main(["fit", *SMALL, "--model.weights", str(weights), *data, "-c", "bad"])
    assert seen == []
    refused(code)


@pytest.mark.parametrize("name", FLAGS)
def test_hostile_flags_are_refused_without_side_effects(
    name: str, sandbox: Path, refused: Callable[[int], str]
) -> None:
    with record_side_effects() as seen:
        code = main(["fit", *FLAGS[name]])
    assert seen == []
    refused(code)


def has_side_effect(function: Callable[[], Any]) -> bool:
    """Whether a side effect of the function is recorded."""
    with record_side_effects() as seen:
        try:
            function()
        except Exception as error:
            assert not isinstance(error, NameError)
    return bool(seen)


def test_side_effects_are_recorded(sandbox: Path) -> None:
    import importlib
    import socket
    import subprocess

    before = set(sandbox.iterdir())
    assert has_side_effect(lambda: importlib.import_module("evil_marker"))
    assert (sandbox / "poisoned").exists()
    (sandbox / "poisoned").unlink()
    assert has_side_effect(lambda: os.system("true"))
    assert has_side_effect(lambda: subprocess.Popen(["true"]).wait())
    assert has_side_effect(lambda: (sandbox / "poisoned").touch())
    assert has_side_effect(lambda: (sandbox / "poisoned").unlink())
    assert has_side_effect((sandbox / "poisoned").mkdir) and has_side_effect((sandbox / "poisoned").rmdir)
    assert has_side_effect(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1))
    assert not has_side_effect(lambda: (sandbox / "precious").read_text())
    assert set(sandbox.iterdir()) == before
    (sandbox / "bad").write_bytes(b"cevil_marker\nHead\n.")
    del sys.modules["evil_marker"]
    assert has_side_effect(lambda: torch.load(sandbox / "bad", weights_only=False))
    (sandbox / "bad").unlink()
    if (sandbox / "poisoned").exists():
        (sandbox / "poisoned").unlink()
