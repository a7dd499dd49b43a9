"""Feature store under failures: kills, full disks, read-only folders, and concurrent builders."""

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
from project.runtime.atomic_write import TEMPORARY_PREFIX
from tests.conftest import SMALL, STORED, row_counts

Fit = Callable[..., int]
Counts = Callable[..., tuple[int, int]]
Mount = Callable[..., None]

#: Kills writing children at random times. Prints for each child: number of temporary files at its start, number of
#: completed writes when it was killed, and number of temporary files it left.
KILL_WRITERS = """
import os, random, signal, sys, time, torch
from pathlib import Path
from project.features.store import TEMPORARY_PREFIX, Space
from tests.features.test_store_failures import row_keys

rng, space = random.Random(0), Space(Path(sys.argv[1]), {})
count_temporary = lambda: len(list(space.path.glob(TEMPORARY_PREFIX + "*")))
for child in range(12):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with space.lock():
            os.write(writer, bytes([count_temporary()]))
            for number in range(1000):
                space.write(row_keys(f"{child} {number}"), torch.full((64, 2048), float(child)))
                os.write(writer, b".")
    os.close(writer)
    found = os.read(reader, 1)[0]
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(found, len(os.read(reader, 1000)), count_temporary())
"""


def row_keys(name: str, count: int = 64) -> np.ndarray:
    return as_keys([row_key(f"{name} {i}".encode(), "") for i in range(count)])


def temporary_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def test_builders_exclude_each_other_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no flock; filelock then uses lock files."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    space, waiting, done = Space(tmp_path, {}), Event(), Event()

    def build_second() -> None:
        with Space(tmp_path, {}).lock(waiting.set):
            done.set()

    with pytest.warns(UserWarning, match="flock not supported"):
        with space.lock():
            thread = Thread(target=build_second)
            thread.start()
            assert waiting.wait(20) and not done.is_set()
            space.write(row_keys("a"), torch.ones(64, 8))
        thread.join(20)
    assert done.is_set() and not len(space.find(row_keys("a")).missing)


def test_failing_lock_is_reported_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(StoreError, match=r"(?s)No locks available.*--features\.folder"), Space(tmp_path, {}).lock():
        pass


def test_killed_writers_leave_only_complete_shards(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILL_WRITERS, str(tmp_path)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    children = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(children) == 12
    assert any(leftovers for _, _, leftovers in children), "some are killed in the middle of a write"
    assert not any(at_start for at_start, _, _ in children), "each builder removes the files of the killed one"
    space = Space(tmp_path, {})
    for path in space.path.glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    written_keys = [
        row_keys(f"{child} {number}") for child, (_, written, _) in enumerate(children) for number in range(written)
    ]
    found = space.find(np.concatenate(written_keys))
    assert not len(found.missing) and not space.verify(found), "every completed write is found"


@contextmanager
def _small_disk(folder: Path, mount: Mount) -> Iterator[None]:
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=120k", "none", str(folder))
    yield


@contextmanager
def _file_size_limit(folder: Path, mount: Mount) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL_DISKS = {"full disk": _small_disk, "file size limit": _file_size_limit}


@pytest.mark.parametrize("kind", FULL_DISKS)
def test_full_disk_is_reported_and_loses_no_row(kind: str, tmp_path: Path, mount: Mount) -> None:
    root = tmp_path / "full"
    with FULL_DISKS[kind](root, mount):
        space = Space(root, {})
        space.write(row_keys("0", 4), torch.zeros(4, 8))
        with pytest.raises(StoreError) as caught:
            space.write(row_keys("1"), torch.ones(64, 2048))
        assert str(space.path) in str(caught.value) and "--features.folder" in str(caught.value)
        assert not temporary_files(root)
        space.write(row_keys("2", 4), torch.zeros(4, 8))
    assert not len(space.find(np.concatenate([row_keys("0", 4), row_keys("2", 4)])).missing)


def test_fit_on_a_full_disk_names_the_folder(fit: Fit, here: Path, mount: Mount, refused: Callable[[int], str]) -> None:
    (here / "store").mkdir()
    mount("-t", "tmpfs", "-o", "size=12k", "none", str(here / "store"))
    error = refused(fit(*STORED))
    assert "store/" in error and "No space left" in error and "--features.folder" in error
    assert not temporary_files(here / "store")


def test_full_disk_does_not_break_engine_selection(
    fit: Fit, here: Path, mount: Mount, refused: Callable[[int], str]
) -> None:
    (here / "store").mkdir()
    mount("-t", "tmpfs", "-o", "size=16k", "none", str(here / "store"))
    (here / "store" / "filler").write_bytes(bytes(16 * 1024))
    assert "No space left" in refused(fit("--features.folder", "store"))
    assert not temporary_files(here / "store")


@pytest.fixture
def read_only(here: Path, mount: Mount) -> Callable[[], None]:
    """Makes the store folder read-only, even for root."""

    def run() -> None:
        store = here / "store"
        store.mkdir(exist_ok=True)
        mount("--bind", str(store), str(store))
        mount("-o", "remount,bind,ro", str(store))

    return run


def test_stored_rows_are_used_from_a_read_only_folder(
    rows: Counts, fit: Fit, read_only: Callable[[], None], refused: Callable[[int], str]
) -> None:
    assert rows() == (0, 36)
    read_only()
    assert rows() == (36, 0)
    error = refused(fit(*STORED, "--model.image_size", "40"))
    assert "cannot be written" in error and "store/" in error and "--features.folder" in error


@pytest.mark.parametrize("flags", [[], ["--features.engine", "onnxruntime"], ["--features.precision", "int8"]], ids=str)
def test_every_engine_reports_a_read_only_folder(
    flags: list[str], fit: Fit, read_only: Callable[[], None], refused: Callable[[int], str]
) -> None:
    read_only()
    error = refused(fit("--features.folder", "store", "--trainer.accelerator", "cpu", *flags))
    assert "cannot be written" in error and "store" in error


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_file_in_place_of_the_folder_is_reported_and_kept(
    precision: str, fit: Fit, here: Path, refused: Callable[[int], str]
) -> None:
    (here / "store").write_text("precious")
    flags = ["--features.engine", "onnxruntime", "--features.precision", precision, "--trainer.accelerator", "cpu"]
    assert "store" in refused(fit("--features.folder", "store", *flags))
    assert (here / "store").read_text() == "precious"


def test_concurrent_fits_compute_each_row_once(here: Path, photos: Path, weights: Path) -> None:
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
    outputs = [process.communicate(timeout=120) for process in fits]
    assert [process.returncode for process in fits] == [0, 0], outputs
    counts = [row_counts(out)[0] for out, _ in outputs]
    assert sum(computed for _, computed in counts) == 36
    assert all(reused + computed == 36 for reused, computed in counts)
    assert sorted(path.name for path in Path("runs/photos").iterdir()) == ["version_0", "version_1"]


def test_builder_waits_for_another_one_and_reports_it(tmp_path: Path) -> None:
    space, waiting, order = Space(tmp_path, {}), Event(), []

    def build_second() -> None:
        with Space(tmp_path, {}).lock(waiting.set):
            order.append("second")

    with space.lock(lambda: pytest.fail("no other builder holds the lock")):
        thread = Thread(target=build_second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
