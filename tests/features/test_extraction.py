"""Extraction: a fit computes exactly the rows that are missing from the store."""

import dataclasses
import functools
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from project import ImageClassifier
from project.data.sources.folder import Folder
from project.data.transforms import training
from project.errors import DataError
from project.features import extraction
from project.features.engines import ExactEngine
from project.features.extraction import compute_rows
from project.features.store import Space
from project.features.views import View, digest_images, image_views, load_image
from project.preprocessing import Preprocessing
from project.runtime.distributed import ProcessGroup
from project.runtime.system import cores
from tests.conftest import SMALL, STORED, draw, scalars
from tests.forked import start

Fit = Callable[..., int]
Counts = Callable[..., tuple[int, int]]
PREPROCESSING = Preprocessing(36, 32, "bilinear", (0.5,) * 3, (0.5,) * 3)


def kill_after_the_first_shard() -> None:
    """Write one shard per batch of 8 images, and kill this process after the first one."""

    def write(self: Space, *arguments: Any) -> None:
        original_write(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    original_write, Space.write = Space.write, write  # type: ignore[method-assign, assignment]
    extraction.FLUSH_SECONDS, ExactEngine.batch_size = 0.0, 8


def test_killed_extraction_resumes_from_stored_rows(rows: Counts, photos: Path, weights: Path, here: Path) -> None:
    flags = [*SMALL, *STORED, "--model.weights", str(weights), "--data.root", str(photos)]
    killed = start(here, ["fit", *flags], prepare=kill_after_the_first_shard)
    assert killed.wait() == -signal.SIGKILL, killed.output
    assert rows() == (8, 28)
    assert rows() == (36, 0)


def test_new_images_compute_only_their_own_rows(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    for number in range(2):
        draw(album / f"train/red/new{number}.png", (200, 0, 0), 1000 + number)
    assert rows("--data.root", "album") == (36, 2)


def test_renamed_or_relabelled_images_reuse_their_rows(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    (album / "train/red/0.png").rename(album / "train/red/renamed.png")
    (album / "train/red/1.png").rename(album / "train/blue/moved.png")
    album.rename("elsewhere")
    assert rows("--data.root", "elsewhere") == (36, 0)


def test_changed_image_recomputes_one_row(rows: Counts, album: Path) -> None:
    assert rows("--data.root", "album") == (0, 36)
    draw(album / "val/red/0.png", (200, 0, 0), 1000)
    assert rows("--data.root", "album") == (35, 1)


def test_changed_computation_recomputes_all_rows(rows: Counts) -> None:
    assert rows() == (0, 36)
    torch.manual_seed(2)
    torch.save(timm.create_model("test_resnet").state_dict(), "other.pth")
    changes = [
        ["--model.image_size", "40"],
        ["--model.trainable", "layer4"],
        ["--model.weights", "other.pth"],
        ["--features.precision", "bf16"],
    ]
    for change in changes:
        assert rows(*change) == (0, 36), change
    assert rows() == (36, 0)


def test_renamed_weights_with_equal_tensors_reuse_rows(rows: Counts, weights: Path) -> None:
    assert rows() == (0, 36)
    shutil.copy(weights, "copy.pth")
    assert rows("--model.weights", "copy.pth") == (36, 0)


def test_unreadable_image_is_named_and_earlier_rows_are_kept(
    rows: Counts, fit: Fit, album: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.features.engines.ExactEngine.batch_size", 4)
    content = (album / "train/red/3.png").read_bytes()  # the twentieth image
    (album / "train/red/3.png").write_bytes(content[: len(content) // 2])
    assert "album/train/red/3.png" in refused(fit(*STORED, "--data.root", "album"))
    (album / "train/red/3.png").write_bytes(content)
    assert rows("--data.root", "album") == (16, 20)


def test_image_changed_after_hashing_is_named(
    fit: Fit, album: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest_then_change(*arguments: Any) -> list[bytes]:
        digests = digest_images(*arguments)
        draw(album / "train/red/3.png", (0, 0, 0), 0)
        return digests

    monkeypatch.setattr("project.features.views.digest_images", digest_then_change)
    error = refused(fit(*STORED, "--data.root", "album"))
    assert "album/train/red/3.png" in error and "changed" in error


def flat_views(source: Folder, augment: str, count: int) -> list[View]:
    """Views of the training images, view by view."""
    samples = source.splits["train"]
    names = [f"view {number}" for number in range(count)]
    digests = digest_images(source, samples, ProcessGroup())
    views = image_views(source, samples, digests, training(PREPROCESSING, augment), names)
    return [image for view in views for image in view]


def test_views_are_deterministic_and_differ_from_each_other(photos: Path) -> None:
    source = Folder(str(photos))
    images = flat_views(source, "standard", 2)
    assert len({image.key for image in images}) == 48
    torch.manual_seed(0)
    first = [load_image(source, image) for image in images]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            torch.manual_seed(torch.seed() % 2**31)
            again = list(pool.map(lambda image: load_image(source, image), images))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_rng_state(state)
    load_image(source, images[0])
    assert torch.equal(torch.get_rng_state(), state), "the global random state is unchanged"
    assert not any(torch.equal(a, b) for a, b in zip(first[:24], first[24:], strict=True))


def test_views_are_computed_once_and_rotate_over_epochs(rows: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[set[bytes]] = [set() for _ in range(4)]
    training_step = ImageClassifier.training_step

    def record_rows(self: ImageClassifier, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        epochs[self.current_epoch] |= {row.numpy().tobytes() for row in batch[0]}
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", record_rows)
    flags = ["--data.augment", "standard", "--features.views", "2", "--data.batch_size", "7"]
    assert rows(*flags, "--trainer.max_epochs", "4") == (0, 2 * 24 + 12)
    assert [len(epoch) for epoch in epochs] == [24] * 4
    assert epochs[0] == epochs[2] and epochs[1] == epochs[3] and not epochs[0] & epochs[1]


def test_more_views_compute_only_the_new_ones(rows: Counts) -> None:
    assert rows("--data.augment", "flip", "--features.views", "1") == (0, 36)
    assert rows("--data.augment", "flip", "--features.views", "3") == (36, 48)
    assert rows("--data.augment", "flip", "--trainer.max_epochs", "4") == (84, 24), "4 views by default"
    assert rows("--data.augment", "flip", "--trainer.max_epochs", "2") == (60, 0), "at most one view per epoch"
    assert rows() == (36, 0), "the first view is not augmented"
    logged = scalars(Path("runs/photos/version_4"))
    assert logged.Scalars("features/rows_reused")[0].value == 36


class PixelSumEngine:
    """An engine that is fed like a GPU; the row of an image is the sum of its pixels."""

    single_threaded = False
    tunes_batch_size = True
    prefetch = 3
    batch_size = 64

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        self.batch_sizes.append(len(images))
        return images.flatten(1).sum(1, keepdim=True)


@pytest.fixture
def source_and_images(photos: Path) -> tuple[Folder, list[View]]:
    """A source, and 168 views of its images: two full batches and a partial one."""
    source = Folder(str(photos))
    return source, flat_views(source, "flip", 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_and_processes_feed_a_gpu_in_order(workers: int, source_and_images: tuple[Folder, list[View]]) -> None:
    source, images = source_and_images
    engine = PixelSumEngine()
    load = functools.partial(load_image, source)
    batches, processes = [], []
    for batch in compute_rows(engine, images, load, workers):
        batches.append(batch)
        processes = processes or multiprocessing.active_children()
    assert len(processes) == workers
    assert [process.exitcode for process in processes] == [0] * workers, "no worker fails or hangs at its exit"
    assert [image for batch, _ in batches for image in batch] == images
    expected = torch.stack([load(image).sum().reshape(1) for image in images])
    assert torch.equal(torch.cat([rows for _, rows in batches]), expected)
    assert engine.batch_sizes == [64, 64, 40]


@pytest.mark.parametrize("workers", [0, 2])
def test_image_changed_during_extraction_is_named(workers: int, source_and_images: tuple[Folder, list[View]]) -> None:
    source, images = source_and_images
    images[70] = dataclasses.replace(images[70], key=b"of something else")
    with pytest.raises(DataError, match=f"^{re.escape(images[70].sample.name)} was changed"):
        list(compute_rows(PixelSumEngine(), images, functools.partial(load_image, source), workers))


def test_worker_processes_are_used_for_many_independent_images_on_a_gpu(
    source_and_images: tuple[Folder, list[View]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, images = source_and_images
    worker_counts: list[int] = []
    monkeypatch.setattr(
        extraction, "compute_rows", lambda engine, images, load, workers: iter(worker_counts.append(workers) or ())
    )

    def extract() -> None:
        extraction.extract(PixelSumEngine(), images, source, Space(tmp_path, {}))  # type: ignore[arg-type]

    extract()
    monkeypatch.setattr(extraction, "MIN_IMAGES_FOR_WORKERS", 100)
    extract()
    monkeypatch.setattr(PixelSumEngine, "prefetch", 0)
    extract()
    monkeypatch.setattr(PixelSumEngine, "prefetch", 3)
    monkeypatch.setattr(Folder, "prefetch", lambda self, samples: None)
    extract()
    assert worker_counts == [0, cores(), 0, 0], "few images; many; on a CPU; a source with its own prefetch"


def test_duplicate_files_are_computed_once(rows: Counts, album: Path) -> None:
    shutil.copy(album / "train/red/0.png", album / "train/red/twin.png")
    shutil.copy(album / "train/red/0.png", album / "val/red/twin.png")
    assert rows("--data.root", "album") == (0, 36)


def test_equal_pixels_in_a_different_file_are_another_image(rows: Counts, album: Path) -> None:
    Image.open(album / "train/red/0.png").save(album / "train/red/0.bmp")
    assert rows("--data.root", "album") == (0, 37)
