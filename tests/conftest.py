"""Shared fixtures: images of coloured noise, a weights file, a finished run, and helpers to run the command line."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# For child processes: on small tensors, a second thread only spins and slows others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Child processes, the fork server included, import this repository and not another one that is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])])

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
#: A ResNet with the stages of ResNet18 and a thirtieth of its parameters, which are hashed and written in each fit.
BACKBONE = "timm/test_resnet"
FEATURES = 96  # its width
#: Flags of a small and fast model.
SMALL = ["--model.backbone", BACKBONE, "--model.image_size", "32", "--data.num_workers", "0"]
SMALL += ["--dashboard.figures", "false", "--model.head_init", "random"]  # both take longer than the epochs
#: Flags that re-enable the dashboard's figures after SMALL.
FIGURES = ["--dashboard.figures", "true"]

#: Flag that solves the head again after SMALL.
SOLVED = ["--model.head_init", "auto"]

#: Flags of a fit with its own feature store and a fixed engine.
STORED = ["--features.folder", "store", "--features.engine", "torch", "--trainer.accelerator", "cpu"]


@pytest.hookimpl(optionalhook=True)  # the hook exists only if pytest-xdist is loaded
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, because many tests wait for processes."""
    return len(os.sched_getaffinity(0)) + 1


#: The files that take longest. A worker runs whole files, and one that starts such a file last works alone at the end.
FIRST = ("test_exact_resume.py", "test_notebooks.py", "test_ranks.py", "test_distributed.py", "test_resumed_fits.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache folder of all tests and their child processes, instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(path: Path, colour: tuple[int, int, int], seed: int) -> Path:
    """Write an image of a colour with noise."""
    noise = np.random.default_rng(seed).integers(-40, 40, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(path)
    return path


def scalars(run: Path) -> EventAccumulator:
    """TensorBoard events of a run."""
    events = EventAccumulator(str(run))
    events.Reload()
    return events


def stop_workers(loader: Any) -> None:
    """Stop the workers of a DataLoader, as a trainer does. The garbage collector would take 5 s for each."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def row_counts(output: str) -> list[tuple[int, int]]:
    """Reused and computed feature rows of each fit in an output."""
    counts = re.findall(r"Features: (\d+) rows reused, (\d+) computed", output)
    return [(int(reused), int(computed)) for reused, computed in counts]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/{train,val,test}/CLASS/*.png``: three colours, 8, 4 and 4 images of each. Read-only."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for index, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 8), ("val", 4), ("test", 4)):
            for number in range(count):
                draw(root / split / name / f"{number}.png", colour, 100 * index + 10 * (split == "val") + number)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of ``BACKBONE``."""
    import timm

    torch.manual_seed(2)
    network = timm.create_model(BACKBONE.removeprefix("timm/"), zero_init_last=False)
    for norm in (network.layer4[-1].bn2, network.layer4[-1].downsample[2]):
        norm.weight.data.mul_(5)  # with features of this size, a head separates the colours after three steps
    path = tmp_path_factory.mktemp("weights") / "test_resnet.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def resnet18_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet18 weights file."""
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
    """Folder of a finished run. Read-only: see ``run``."""
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


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """``best.ckpt``, calibrated on 60 validation and 60 training images, and ``photos`` in its folder. Read-only."""
    folder = tmp_path_factory.mktemp("calibrated")
    for index, (name, colour) in enumerate(COLOURS.items()):
        for number in range(40):
            path = folder / f"photos/{'val' if number % 2 else 'train'}/{name}/{number}.png"
            draw(path, colour, 100 * index + number)
    flags = [*SMALL, *SOLVED, "--model.weights", str(weights), "--data.root", str(folder / "photos")]
    flags += ["--trainer.default_root_dir", str(folder / "runs"), "--trainer.max_epochs", "0"]
    assert main(["fit", *flags]) == 0
    (path,) = folder.rglob("best.ckpt")
    return path.rename(folder / "best.ckpt")


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """A writable copy of the finished run, in an otherwise empty working directory."""
    return Path(shutil.copytree(trained, here / "runs" / "photos" / "version_0"))


@pytest.fixture
def fit(here: Path, photos: Path, weights: Path) -> Callable[..., int]:
    """Runs a small fit in an empty working directory; additional flags override its own."""

    def run_fit(*flags: str) -> int:
        small = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "1"]
        return main(["fit", *small, *flags])

    return run_fit


@pytest.fixture
def rows(fit: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, int]]:
    """Runs a small fit with its own feature store; returns its numbers of reused and computed rows."""

    def run_fit(*flags: str) -> tuple[int, int]:
        assert fit(*STORED, *flags) == 0
        (counts,) = row_counts(capsys.readouterr().out)
        return counts

    return run_fit


@pytest.fixture
def album(here: Path, photos: Path) -> Path:
    """A writable copy of the photos."""
    return Path(shutil.copytree(photos, here / "album"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    """Asserts that a verb ended with a user error (exit code 2, at most two lines); returns the message."""

    def check(code: int) -> str:
        err = capsys.readouterr().err
        message = err[err.index("error: ") :]
        assert code == 2
        assert "Traceback" not in err
        assert len(message.strip().splitlines()) <= 2, message
        return message

    return check


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Runs ``mount`` with arguments that end in a folder; skips the test if mounting is not permitted."""
    mounted: list[str] = []

    def run_mount(*arguments: str) -> None:
        result = subprocess.run(["mount", *arguments], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mounting is not permitted: {result.stderr.strip()}")
        if "remount" not in arguments[1]:
            mounted.append(arguments[-1])

    yield run_mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


class _ProductDtypes(TorchDispatchMode):
    """Records the result dtypes of matrix products and convolutions."""

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
    """Dtypes of the matrix products and convolutions in a fit's training steps."""
    dtypes: set[torch.dtype] = set()
    step = ImageClassifier.training_step

    def recorded_step(self: ImageClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        with _ProductDtypes(dtypes):
            return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", recorded_step)
    return dtypes
