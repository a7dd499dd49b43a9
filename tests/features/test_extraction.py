"""Which rows a fit computes: those that are missing, and no others."""

import dataclasses
import functools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from project import ImageClassifier
from project.data.sources.folder import Folder
from project.data.transforms import training
from project.errors import DataError
from project.features import extraction
from project.features.extraction import run
from project.features.store import Space
from project.features.views import digest_images, image_views, load_image
from project.preprocessing import Preprocessing
from project.runtime.distributed import ProcessGroup
from project.runtime.system import cores
from tests.conftest import SMALL, STORED, draw, scalars

# A DataLoader that the garbage collector ends, as after a test that expects an error, may find that its workers have
# ended abnormally: torch's finalizers run in any order. It says so in whichever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


Fit = Callable[..., int]
Counts = Callable[..., tuple[int, int]]

#: A fit that writes a shard a batch of 8, says so, and then takes its time.
SLOW = """
import sys, time
from project.cli.main import main
from project.features import extraction
from project.features.store import Space
from project.features.engines import ExactEngine

def write(self, keys, rows):
    whole(self, keys, rows)
    print("written", flush=True)
    time.sleep(60)

whole, Space.write, extraction.FLUSH, ExactEngine.batch_size = Space.write, write, 0.0, 8
main(sys.argv[1:])
"""


def test_a_killed_extraction_resumes_where_it_was(rows: Counts, photos: Path, weights: Path) -> None:
    flags = [*SMALL, *STORED, "--model.weights", str(weights), "--data.root", str(photos)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW, "fit", *flags]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        assert any("written" in line for line in killed.stdout)
        killed.send_signal(signal.SIGKILL)
    assert rows() == (8, 28)
    assert rows() == (36, 0)


def test_new_images_cost_their_own_rows(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    for number in range(2):
        draw(album / f"train/red/new{number}.png", (200, 0, 0), 1000 + number)
    assert rows("--data.root", "album") == (36, 2)


def test_a_renamed_or_relabelled_image_costs_nothing(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    (album / "train/red/0.png").rename(album / "train/red/renamed.png")
    (album / "train/red/1.png").rename(album / "train/blue/moved.png")
    album.rename("elsewhere")
    assert rows("--data.root", "elsewhere") == (36, 0)


def test_a_changed_image_costs_one_row(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    draw(album / "val/red/0.png", (200, 0, 0), 1000)
    assert rows("--data.root", "album") == (35, 1)


def test_what_makes_the_rows_makes_them_anew(rows: Counts, weights: Path) -> None:
    assert rows() == (0, 36)
    torch.manual_seed(2)
    torch.save(resnet18(weights=None).state_dict(), "other.pth")
    changes = [
        ["--model.image_size", "40"],
        ["--model.trainable", "layer4"],
        ["--model.weights", "other.pth"],
        ["--features.precision", "bf16"],
    ]
    for change in changes:
        assert rows(*change) == (0, 36), change
    assert rows() == (36, 0)


def test_weights_of_another_name_with_the_same_tensors_make_the_same_rows(rows: Counts, weights: Path) -> None:
    assert rows() == (0, 36)
    shutil.copy(weights, "copy.pth")
    assert rows("--model.weights", "copy.pth") == (36, 0)


def test_an_unreadable_image_is_named_and_rows_before_it_are_kept(
    rows: Counts, fit: Fit, album: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.features.engines.ExactEngine.batch_size", 4)
    whole = (album / "train/red/3.png").read_bytes()  # the twentieth
    (album / "train/red/3.png").write_bytes(whole[: len(whole) // 2])
    assert "album/train/red/3.png" in refused(fit(*STORED, "--data.root", "album"))
    (album / "train/red/3.png").write_bytes(whole)
    assert rows("--data.root", "album") == (16, 20)


def test_an_image_that_changes_meanwhile_is_named(
    fit: Fit, album: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest_then_change(*arguments: Any) -> list[bytes]:
        digests = digest_images(*arguments)
        draw(album / "train/red/3.png", (0, 0, 0), 0)
        return digests

    monkeypatch.setattr("project.features.views.digest_images", digest_then_change)
    said = refused(fit(*STORED, "--data.root", "album"))
    assert "album/train/red/3.png" in said and "changed" in said


def test_a_view_is_the_same_each_time_and_from_each_thread_and_another_than_the_others(photos: Path) -> None:
    source = Folder(str(photos))
    samples = source.splits["train"]
    transform = training(Preprocessing(36, 32, "bilinear", (0.5,) * 3, (0.5,) * 3), "standard")
    digests = digest_images(source, samples, ProcessGroup())
    views = image_views(source, samples, digests, transform, ["view 0", "view 1"])
    images = [image for view in views for image in view]
    assert len({image.key for image in images}) == 48
    torch.manual_seed(0)
    once = [load_image(source, image) for image in images]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            torch.manual_seed(torch.seed() % 2**31)
            again = list(pool.map(lambda image: load_image(source, image), images))
            assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    torch.set_rng_state(state)
    load_image(source, images[0])
    assert torch.equal(torch.get_rng_state(), state), "nothing is taken from the generator of the fit"
    assert not any(torch.equal(a, b) for a, b in zip(once[:24], once[24:], strict=True))


def test_views_are_computed_once_and_taken_in_turn(rows: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[set[bytes]] = [set() for _ in range(4)]
    step = ImageClassifier.training_step

    def watch(self: ImageClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        epochs[self.current_epoch] |= {row.numpy().tobytes() for row in batch[0]}
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", watch)
    flags = ["--data.augment", "standard", "--features.views", "2", "--data.batch_size", "7"]
    assert rows(*flags, "--trainer.max_epochs", "4") == (0, 2 * 24 + 12)
    assert [len(epoch) for epoch in epochs] == [24] * 4
    assert epochs[0] == epochs[2] and epochs[1] == epochs[3] and not epochs[0] & epochs[1]


def test_more_views_cost_the_new_ones_alone(rows: Counts) -> None:
    assert rows("--data.augment", "flip", "--features.views", "1") == (0, 36)
    assert rows("--data.augment", "flip", "--features.views", "3") == (36, 48)
    assert rows("--data.augment", "flip", "--trainer.max_epochs", "4") == (84, 24), "4 by default"
    assert rows("--data.augment", "flip", "--trainer.max_epochs", "2") == (60, 0), "no more than there are epochs"
    assert rows() == (36, 0), "the first view is the plain one"
    logged = scalars(Path("runs/photos/version_4"))
    assert logged.Scalars("features/rows_reused")[0].value == 36


class Sums:
    """An engine that is fed as a GPU is: the row of an image is the sum of its pixels."""

    side_by_side = False
    grows = True
    ahead = 3
    batch_size = 64

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        self.batches.append(len(images))
        return images.flatten(1).sum(1, keepdim=True)


@pytest.fixture
def many(photos: Path) -> tuple[Folder, list[Any]]:
    """A source, and 168 views of its images: two whole batches and one that is not."""
    source = Folder(str(photos))
    samples, transform = (
        source.splits["train"],
        training(Preprocessing(36, 32, "bilinear", (0.5,) * 3, (0.5,) * 3), "flip"),
    )
    digests = digest_images(source, samples, ProcessGroup())
    views = image_views(source, samples, digests, transform, [f"view {number}" for number in range(7)])
    return source, [image for view in views for image in view]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_is_fed_in_order_by_threads_and_by_processes(workers: int, many: tuple[Folder, list[Any]]) -> None:
    source, images = many
    engine = Sums()
    load = functools.partial(load_image, source)
    found = list(run(engine, images, load, workers))
    assert [image for batch, _ in found for image in batch] == images
    expected = torch.stack([load(image).sum().reshape(1) for image in images])
    assert torch.equal(torch.cat([rows for _, rows in found]), expected)
    assert engine.batches == [64, 64, 40]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_changes_while_a_gpu_is_fed_is_named(
    workers: int, many: tuple[Folder, list[Any]], tmp_path: Path
) -> None:
    source, images = many
    images[70] = dataclasses.replace(images[70], key=b"of something else")
    with pytest.raises(DataError, match=f"^{re.escape(images[70].sample.name)} was changed"):
        list(run(Sums(), images, functools.partial(load_image, source), workers))


def test_processes_feed_a_gpu_where_there_are_many_images_that_are_read_apart(
    many: tuple[Folder, list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, images = many
    found: list[int] = []
    monkeypatch.setattr(extraction, "run", lambda engine, images, load, workers: iter(found.append(workers) or ()))
    extraction.extract(Sums(), images, source, Space(tmp_path, {}))
    monkeypatch.setattr(extraction, "MANY", 100)
    extraction.extract(Sums(), images, source, Space(tmp_path, {}))
    monkeypatch.setattr(Sums, "ahead", 0)
    extraction.extract(Sums(), images, source, Space(tmp_path, {}))
    monkeypatch.setattr(Sums, "ahead", 3)
    monkeypatch.setattr(Folder, "prefetch", lambda self, samples: None)
    extraction.extract(Sums(), images, source, Space(tmp_path, {}))
    assert found == [0, cores(), 0, 0], "few; many; on a CPU; from a source whose reads depend on each other"


def test_the_same_file_twice_is_computed_once(rows: Counts, album: Path) -> None:
    shutil.copy(album / "train/red/0.png", album / "train/red/twin.png")
    shutil.copy(album / "train/red/0.png", album / "val/red/twin.png")
    assert rows("--data.root", "album") == (0, 36)


def test_the_same_pixels_in_another_file_are_another_image(rows: Counts, album: Path) -> None:
    Image.open(album / "train/red/0.png").save(album / "train/red/0.bmp")
    assert rows("--data.root", "album") == (0, 37)
