"""Data that the tests make themselves: images of coloured noise, a file of weights, a finished run."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Of the processes that tests start: on tensors this small, a second thread only waits, and spins while others compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from project.classifier import ImageClassifier
from project.cli.main import main

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
#: Flags of a small, fast model.
SMALL = ["--model.backbone", "resnet18", "--model.image_size", "32", "--data.num_workers", "0"]
SMALL += ["--dashboard.figures", "false"]  # they take longer than the fit
#: After the flags of a small model: the dashboard's figures.
FIGURES = ["--dashboard.figures", "true"]

#: Flags of a fit whose rows are in a folder of its own, and come from one engine without a choice.
STORED = ["--features.folder", "store", "--features.engine", "torch", "--trainer.accelerator", "cpu"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all tests and of the processes that they start, in place of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> Path:
    """Write an image of noise around a colour."""
    noise = np.random.default_rng(seed).integers(-40, 40, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(path)
    return path


def scalars(run: Path) -> EventAccumulator:
    """What a run has logged."""
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def stop_workers(loader: Any) -> None:
    """End the processes of a DataLoader, as a trainer does. Left to the garbage collector, they take 5 s each."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def told(out: str) -> list[tuple[int, int]]:
    """How many rows each fit that printed this has reused and computed."""
    counts = re.findall(r"Features: (\d+) rows reused, (\d+) computed", out)
    return [(int(reused), int(computed)) for reused, computed in counts]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/{train,val,test}/CLASS/*.png``: three colours, 8, 4 and 4 images of each. Not to be written to."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for index, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 8), ("val", 4), ("test", 4)):
            for number in range(count):
                draw(root / split / name / f"{number}.png", colour, 100 * index + 10 * (split == "val") + number)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for ResNet18."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18(weights=None).state_dict(), path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path, weights: Path) -> Path:
    """Folder of a finished run. Not to be written to: see ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        code = main(
            [
                *("fit", *SMALL, *FIGURES, "--model.weights", str(weights), "--data.root", str(photos)),
                *("--trainer.max_epochs", "3", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"),
            ]
        )
    finally:
        os.chdir(before)
    assert code == 0
    return folder / "runs" / "photos" / "version_0"


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """A copy of the finished run, in an empty working directory."""
    return Path(shutil.copytree(trained, here / "runs" / "photos" / "version_0"))


@pytest.fixture
def fit(here: Path, photos: Path, weights: Path) -> Callable[..., int]:
    """Runs a small fit in an empty working directory; later flags beat its own."""

    def run_fit(*flags: str) -> int:
        small = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "1"]
        return main(["fit", *small, *flags])

    return run_fit


@pytest.fixture
def rows(fit: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, int]]:
    """Runs a small fit on this test's own store; gives how many rows it has reused and computed."""

    def run_fit(*flags: str) -> tuple[int, int]:
        assert fit(*STORED, *flags) == 0
        (counts,) = told(capsys.readouterr().out)
        return counts

    return run_fit


@pytest.fixture
def album(here: Path, photos: Path) -> Path:
    """A copy of the photos that may be changed."""
    return Path(shutil.copytree(photos, here / "album"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    """Checks that a verb ended as a mistake should, and gives back what it said."""

    def check(code: int) -> str:
        err = capsys.readouterr().err
        said = err[err.index("error: ") :]
        assert code == 2
        assert "Traceback" not in err
        assert len(said.strip().splitlines()) <= 2, said
        return said

    return check


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mounts with the arguments given, the last of which is the folder; skips where that is not allowed."""
    mounted: list[str] = []

    def run_mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
        if "remount" not in arguments[1]:
            mounted.append(arguments[-1])

    yield run_mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


class _Products(TorchDispatchMode):
    """Notes the type of the results of matrix products and convolutions."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "linear", "convolution", "convolution_overrideable"):
            self.dtypes.add(result.dtype)
        return result


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The types that a fit's training steps multiply in."""
    dtypes: set[torch.dtype] = set()
    step = ImageClassifier.training_step

    def watched(self: ImageClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        with _Products(dtypes):
            return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", watched)
    return dtypes
