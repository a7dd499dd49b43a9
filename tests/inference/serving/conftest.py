"""Fixtures: a running server, and a model that waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from project.inference.many_tasks import ManyTasks
from project.inference.serving.served_model import ServedModel
from tests.inference.serving.running_server import GatedModel, Server, serving


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def photo(photos: Path) -> bytes:
    return (photos / "val/red/0.png").read_bytes()


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(lambda: ServedModel(ManyTasks.load([checkpoint]), [None])) as running:
        yield running


@pytest.fixture
def gated(checkpoint: Path) -> Iterator[GatedModel]:
    """A model whose gate opens at the end of the test at the latest."""
    model = GatedModel(ManyTasks.load([checkpoint]), [None])
    yield model
    model.gate.set()
