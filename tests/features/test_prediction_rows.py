"""Batches of rows come in order, with the errors of unreadable images, however images are decoded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from project.data import prediction_loader
from project.data.prediction_inputs import FileList
from project.data.prediction_loader import PredictionImageSet, PredictionLoader, StoredPart
from project.data.sources.files import Files
from project.errors import DataError
from project.features.prediction_rows import PrefixEngine, decoding_processes, encoded_batches
from project.preprocessing import Preprocessing
from tests.conftest import draw

COUNT, BAD = 21, 10
SMALL, LARGE = (Preprocessing(size, size, "bilinear", (0.5,) * 3, (0.5,) * 3) for size in (8, 16))


class MeanEngine:
    """The mean color of each image as its row; records the sizes of its batches."""

    def __init__(self, batch_size: int, prefetch: int, single_threaded: bool) -> None:
        self.batch_size = batch_size
        self.prefetch = prefetch
        self.single_threaded = single_threaded
        self.tunes_batch_size = False
        self.sizes: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        return images.float().mean((2, 3))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """21 images of increasing brightness; one cannot be read."""
    paths = [draw(tmp_path / f"{number:02}.png", (10 * number + 20,) * 3, number) for number in range(COUNT)]
    paths[BAD].write_bytes(b"no image")
    return paths


def make_loader(paths: list[Path], workers: int = 0, records_errors: bool = True) -> PredictionLoader:
    images = PredictionImageSet(FileList(map(str, paths)), Files(), [SMALL, LARGE], records_errors)
    numbers = np.array([number for number in range(COUNT) if number != 3])  # number 3 is predicted already
    return PredictionLoader(images, numbers, 4, workers, pin_memory=False)


@pytest.mark.parametrize(
    ("engine", "workers", "sizes"),
    [
        (MeanEngine(2, 0, True), 0, {2}),  # each batch in calls of the engine's size
        (MeanEngine(8, 0, False), 0, {8, 4}),  # two batches at a time
        (MeanEngine(8, 2, False), 2, {8, 4}),  # collected by a thread, as for a GPU, while workers decode
        (MeanEngine(3, 2, False), 0, {3, 1}),
    ],
)
def test_rows_are_those_of_each_image(
    engine: MeanEngine, workers: int, sizes: set[int], paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(paths, workers)
    other = MeanEngine(engine.batch_size, engine.prefetch, engine.single_threaded)
    batches = [*encoded_batches(loader, [PrefixEngine(engine, 1), PrefixEngine(other, 0)])]
    assert len(batches) == len(loader) == 5 and all(batch.encoded for batch in batches)
    numbers = [number for batch in batches for number in batch.images.numbers]
    assert numbers == [number for number in range(COUNT) if number != 3]
    assert [name for batch in batches for name in batch.images.names] == [str(paths[number]) for number in numbers]
    errors = dict(zip(numbers, (error for batch in batches for error in batch.images.errors), strict=True))
    assert [number for number, error in errors.items() if error] == [BAD]
    assert "is not a readable image" in errors[BAD]
    for position in range(2):
        rows = torch.cat([batch.inputs[position] for batch in batches]).mean(1)
        expected = torch.tensor([10.0 * number + 20 for number in numbers])
        good = torch.tensor([number != BAD for number in numbers])
        torch.testing.assert_close(rows[good], expected[good], atol=8, rtol=0)  # of the noise
    assert {*engine.sizes} == sizes


class EvenNumbers:
    """Finds the images whose brightness is a multiple of 20: every second one. Their rows are -1."""

    def __init__(self, contents: dict[bytes, int]) -> None:
        self._numbers = contents

    def __call__(self, contents: Sequence[bytes]) -> StoredPart:
        positions = [index for index, content in enumerate(contents) if self._numbers[content] % 2 == 0]
        return StoredPart(positions, [-torch.ones(len(positions), 3)] * 2) if positions else StoredPart([], [])


@pytest.mark.parametrize(("single_threaded", "workers"), [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("everything", [False, True])
def test_stored_rows_are_neither_decoded_nor_computed(
    single_threaded: bool, workers: int, everything: bool, paths: list[Path]
) -> None:
    loader = make_loader(paths, workers)
    numbers = {path.read_bytes(): 0 if everything else number for number, path in enumerate(paths)}
    loader.dataset.stored = EvenNumbers(numbers)
    engine = MeanEngine(8, 0, single_threaded)
    batches = [*encoded_batches(loader, [PrefixEngine(engine, 1), PrefixEngine(MeanEngine(8, 0, True), 0)])]
    for batch in batches:
        for rows in batch.inputs:
            expected = [-1 if everything or n % 2 == 0 else 10 * n + 20 for n in batch.images.numbers]
            torch.testing.assert_close(rows.mean(1), torch.tensor(expected).float(), atol=8, rtol=0)
    found = COUNT - 1 if everything else 11
    assert sum(batch.reused for batch in batches) == found
    assert sum(engine.sizes) == COUNT - 1 - found
    assert not [error for batch in batches for error in batch.images.errors if error]  # image 10 is found, not decoded


@pytest.mark.parametrize("looks_up", [False, True])
def test_few_encoded_images_are_in_memory(looks_up: bool, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Content(bytes):
        """Bytes that count how many of them are in memory."""

        count = most = 0

        def __new__(cls, content: bytes) -> "Content":
            cls.count += 1
            cls.most = max(cls.most, cls.count)
            return super().__new__(cls, content)

        def __del__(self) -> None:
            Content.count -= 1

    dataset = make_loader(paths, 0).dataset
    content = dataset.source.content
    numbers = {path.read_bytes(): number for number, path in enumerate(paths)}
    expected = dataset.load(range(COUNT))
    monkeypatch.setattr(dataset.source, "content", lambda sample: Content(content(sample)))
    monkeypatch.setattr(prediction_loader, "LOOKED_UP_BYTES", 2 * max(map(len, numbers)) + 1)
    dataset.stored = EvenNumbers(numbers) if looks_up else None
    batch = dataset.load(range(COUNT))
    assert Content.most <= (8 if looks_up else 2) < COUNT
    if looks_up:
        assert batch.stored is not None and batch.stored.positions == [*range(0, COUNT, 2)]
        assert [len(rows) for rows in batch.stored.rows] == [len(batch.stored.positions)] * 2
    kept = slice(1, None, 2) if looks_up else slice(None)
    assert all(torch.equal(got, all_[kept]) for got, all_ in zip(batch.inputs, expected.inputs, strict=True))


@pytest.mark.parametrize("single_threaded", [True, False])
def test_unreadable_image_stops_if_errors_are_not_recorded(single_threaded: bool, paths: list[Path]) -> None:
    engine = MeanEngine(4, 0, single_threaded)
    loader = make_loader(paths, records_errors=False)
    batches = encoded_batches(loader, [PrefixEngine(engine, 0)])
    with pytest.raises(DataError, match=r"10\.png is not a readable image"):
        list(batches)
    assert torch.get_num_threads() == 1  # as before


def test_images_to_test_an_engine_are_readable(paths: list[Path], tmp_path: Path) -> None:
    small, large = make_loader(paths).dataset.first_images(12)
    assert small.shape == (12, 3, 8, 8) and large.shape == (12, 3, 16, 16)
    assert small.float().mean((1, 2, 3)).min() > 10, "the unreadable image is skipped"
    (small, _) = PredictionImageSet(FileList([str(paths[BAD])]), Files(), [SMALL, LARGE], True).first_images(4)
    assert small.shape == (1, 3, 8, 8) and not small.any()


def test_decoding_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "fork")
    assert decoding_processes(None, 8, 16) == 4 and decoding_processes(3, 8, 16) == 3
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert decoding_processes(None, 8, 16) == 8
