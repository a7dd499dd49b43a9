"""What a store survives: kills, full disks, folders that cannot be written, and two builders at once."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch

from project.errors import StoreError
from project.features.store import Space, as_keys, row_key
from project.runtime.atomic_write import TEMPORARY
from tests.conftest import SMALL, STORED, told

Fit = Callable[..., int]
Counts = Callable[..., tuple[int, int]]
Mount = Callable[..., None]

#: Kills children that write, each at another moment. Prints, a child: how many temporary files it found when it began,
#: how many writes it had done when it was killed, and how many temporary files it left.
KILLS = """
import os, random, signal, sys, time, torch
from pathlib import Path
from project.features.store import TEMPORARY, Space
from tests.features.test_store_failures import row_keys

chance, space = random.Random(0), Space(Path(sys.argv[1]), {})
temporaries = lambda: len(list(space.path.glob(TEMPORARY + "*")))
for child in range(12):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with space.building():
            os.write(writer, bytes([temporaries()]))
            for number in range(1000):
                space.write(row_keys(f"{child} {number}"), torch.full((64, 2048), float(child)))
                os.write(writer, b".")
    os.close(writer)
    found = os.read(reader, 1)[0]
    time.sleep(chance.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(found, len(os.read(reader, 1000)), temporaries())
"""


def row_keys(word: str, count: int = 64) -> np.ndarray:
    return as_keys([row_key(f"{word} {i}".encode(), "") for i in range(count)])


def temporaries(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(TEMPORARY)]


def test_without_locks_there_is_one_builder_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: flock is not there, so files of the library's own stand for locks."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    space, waiting, done = Space(tmp_path, {}), Event(), Event()

    def second() -> None:
        with Space(tmp_path, {}).building(waiting.set):
            done.set()

    with pytest.warns(UserWarning, match="flock not supported"):
        with space.building():
            other = Thread(target=second)
            other.start()
            assert waiting.wait(20) and not done.is_set()
            space.write(row_keys("a"), torch.ones(64, 8))
        other.join(20)
    assert done.is_set() and not len(space.find(row_keys("a")).missing)


def test_a_folder_whose_locks_fail_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(StoreError, match=r"No locks available.*--features\.folder"), Space(tmp_path, {}).building():
        pass


def test_whatever_moment_a_writer_is_killed_at_what_has_a_name_is_whole(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    children = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(children) == 12
    assert any(left for _, _, left in children), "some are killed in the middle of a write"
    assert not any(found for found, _, _ in children), "what one leaves, the next removes"
    space = Space(tmp_path, {})
    for path in space.path.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    told = [
        row_keys(f"{child} {number}") for child, (_, written, _) in enumerate(children) for number in range(written)
    ]
    found = space.find(np.concatenate(told))
    assert not len(found.missing) and not space.verify(found), "what was said to be written is there"


@contextmanager
def _tmpfs(folder: Path, mount: Mount) -> Iterator[None]:
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=120k", "none", str(folder))
    yield


@contextmanager
def _limit(folder: Path, mount: Mount) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {"a full disk": _tmpfs, "a limit on the size of files": _limit}


@pytest.mark.parametrize("how", FULL)
def test_a_full_disk_is_told_and_loses_nothing(how: str, tmp_path: Path, mount: Mount) -> None:
    root = tmp_path / "full"
    with FULL[how](root, mount):
        space = Space(root, {})
        space.write(row_keys("0", 4), torch.zeros(4, 8))
        with pytest.raises(StoreError) as caught:
            space.write(row_keys("1"), torch.ones(64, 2048))
        assert str(space.path) in str(caught.value) and "--features.folder" in str(caught.value)
        assert not temporaries(root)
        space.write(row_keys("2", 4), torch.zeros(4, 8))
    assert not len(space.find(np.concatenate([row_keys("0", 4), row_keys("2", 4)])).missing)


def test_a_fit_on_a_full_disk_ends_with_the_name_of_the_folder(
    fit: Fit, here: Path, mount: Mount, refused: Callable[[int], str]
) -> None:
    (here / "store").mkdir()
    mount("-t", "tmpfs", "-o", "size=60k", "none", str(here / "store"))
    said = refused(fit(*STORED))
    assert "store/" in said and "No space left" in said and "--features.folder" in said
    assert not temporaries(here / "store")


def test_a_full_disk_stops_no_choice_of_an_engine(
    fit: Fit, here: Path, mount: Mount, refused: Callable[[int], str]
) -> None:
    (here / "store").mkdir()
    mount("-t", "tmpfs", "-o", "size=16k", "none", str(here / "store"))
    (here / "store" / "filler").write_bytes(bytes(16 * 1024))
    assert "No space left" in refused(fit("--features.folder", "store"))
    assert not temporaries(here / "store")


@pytest.fixture
def read_only(here: Path, mount: Mount) -> Callable[[], None]:
    """Makes the store's folder one that cannot be written, whoever asks."""

    def run() -> None:
        store = here / "store"
        store.mkdir(exist_ok=True)
        mount("--bind", str(store), str(store))
        mount("-o", "remount,bind,ro", str(store))

    return run


def test_stored_rows_are_used_from_a_folder_that_cannot_be_written(
    rows: Counts, fit: Fit, read_only: Callable[[], None], refused: Callable[[int], str]
) -> None:
    assert rows() == (0, 36)
    read_only()
    assert rows() == (36, 0)
    said = refused(fit(*STORED, "--model.image_size", "40"))
    assert "cannot be written" in said and "store/" in said and "--features.folder" in said


INT8 = ["--features.precision", "int8"]


@pytest.mark.parametrize("flags", [[], ["--features.engine", "onnxruntime"], INT8], ids=str)
def test_no_engine_writes_to_a_folder_that_cannot_be_written(
    flags: list[str], fit: Fit, read_only: Callable[[], None], refused: Callable[[int], str]
) -> None:
    read_only()
    said = refused(fit("--features.folder", "store", "--trainer.accelerator", "cpu", *flags))
    assert "cannot be written" in said and "store" in said


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_file_in_the_place_of_the_folder_is_told(
    precision: str, fit: Fit, here: Path, refused: Callable[[int], str]
) -> None:
    (here / "store").write_text("precious")
    flags = ["--features.engine", "onnxruntime", "--features.precision", precision, "--trainer.accelerator", "cpu"]
    assert "store" in refused(fit("--features.folder", "store", *flags))
    assert (here / "store").read_text() == "precious"


def test_two_fits_at_once_compute_each_row_once(here: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, *STORED, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "1"]
    fits = [
        subprocess.Popen(
            [sys.executable, "-m", "project", "fit", *flags],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in fits]
    assert [process.returncode for process in fits] == [0, 0], said
    counts = [told(out)[0] for out, _ in said]
    assert sum(computed for _, computed in counts) == 36
    assert all(reused + computed == 36 for reused, computed in counts)
    assert sorted(path.name for path in Path("runs/photos").iterdir()) == ["version_0", "version_1"]


def test_a_builder_waits_for_another_one_and_says_so(tmp_path: Path) -> None:
    space, waiting, order = Space(tmp_path, {}), Event(), []

    def second() -> None:
        with Space(tmp_path, {}).building(waiting.set):
            order.append("second")

    with space.building(lambda: pytest.fail("nobody else builds")):
        thread = Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
