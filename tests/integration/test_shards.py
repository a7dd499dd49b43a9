"""Fits over tar shards: each image is read once, then never again."""

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import yaml

from project import load
from project.cli.main import main
from project.data.sources.base import Sample
from project.data.sources.webdataset import Shards
from tests.conftest import SMALL, STORED, told

#: The command line in one of two processes, which says what it has read.
READING = """
import sys
from project import ImageClassifier
from project.cli.main import main
from project.data.shards import Shards

def content(self, sample):
    read.append(int(sample.name.rpartition("#")[2]))
    return real(self, sample)

def tell(self):
    sys.stdout.write(f"rank {self.global_rank} has read {' '.join(map(str, sorted(set(read))))};\\n")

read, real, Shards.content, ImageClassifier.on_fit_end = [], Shards.content, content, tell
sys.exit(main(sys.argv[1:]))
"""

#: The pictures of the dashboard are read from the images themselves, a few dozen of them.
PLAIN = ["--dashboard.figures", "false"]


@pytest.fixture
def packed(here: Path, photos: Path) -> Path:
    """The photos in shards of six: ``shards/{train,val}-N.tar``, classes by name."""
    folder = here / "shards"
    folder.mkdir()
    for split in ("train", "val"):
        files = sorted((photos / split).rglob("*.png"), key=lambda file: (file.stem, file.parent.name))
        for number in range(len(files) // 6):
            with tarfile.open(folder / f"{split}-{number}.tar", "w") as archive:
                for file in files[6 * number : 6 * number + 6]:
                    key = f"{file.stem}-{file.parent.name}"
                    label = here / f"{key}.cls"
                    label.write_text(file.parent.name)
                    archive.add(file, f"{key}.png")
                    archive.add(label, f"{key}.cls")
    return folder


@pytest.fixture
def config(packed: Path, weights: Path) -> Path:
    """A config whose source is the shards, val and all."""
    init = {"train": "shards/train-{0..3}.tar", "val": "shards/val-*.tar"}
    source = {"class_path": "project.data.shards.Shards", "init_args": init}
    path = packed.parent / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"source": source}, "model": {"weights": str(weights)}}))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image is read, by the name of its member."""
    counts: Counter[str] = Counter()
    real = Shards.content

    def content(self: Shards, sample: Sample) -> bytes:
        counts[sample.name] += 1
        return real(self, sample)

    monkeypatch.setattr(Shards, "content", content)
    return counts


def test_a_second_fit_reads_no_image(config: Path, read: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, *STORED, "--trainer.max_epochs", "2", "-c", str(config)]
    assert main(["fit", *PLAIN, *flags]) == 0
    out = capsys.readouterr().out
    assert "Shards: 6 of 6 are read once" in out
    assert told(out) == [(0, 36)]
    assert len(read) == read.total() == 36
    read.clear()
    assert main(["fit", *PLAIN, *flags]) == 0
    out = capsys.readouterr().out
    assert "Shards:" not in out
    assert told(out) == [(36, 0)]
    assert not read
    assert load("runs/shards/version_1/checkpoints/best.ckpt").classes_ == ["blue", "green", "red"]


def test_views_of_an_image_are_computed_together(config: Path, read: Counter[str]) -> None:
    order: list[int] = []
    counted = Shards.content

    def content(self: Shards, sample: Sample) -> bytes:
        order.append(int(sample.name.rpartition("#")[2]))
        return counted(self, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "content", content)
        flags = [*SMALL, *STORED, "--trainer.max_epochs", "2", "--data.augment", "flip", "--features.views", "2"]
        assert main(["fit", *PLAIN, *flags, "-c", str(config)]) == 0
    assert order[:48] == [number for number in range(24) for _ in range(2)]


def test_val_is_held_out_where_there_is_none(
    packed: Path, weights: Path, read: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--data.source", "project.data.shards.Shards", "--data.source.train", "shards/train-*.tar"]
    flags = [*SMALL, *STORED, *source, "--model.weights", str(weights), "--trainer.max_epochs", "1"]
    assert main(["fit", *PLAIN, *flags]) == 0
    assert told(capsys.readouterr().out) == [(0, 24)]
    read.clear()
    assert main(["fit", *PLAIN, *flags]) == 0
    assert not read
    assert main(["check", *source]) == 0
    assert "24 images (24 train) of 3 classes" in capsys.readouterr().out


def test_images_are_read_live(config: Path, read: Counter[str]) -> None:
    flags = [*SMALL, "--features.cache", "off", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    assert main(["fit", *PLAIN, *flags, "-c", str(config)]) == 0
    assert main(["fit", *PLAIN, *flags, "--data.num_workers", "2", "--trainer.max_epochs", "1", "-c", str(config)]) == 0
    assert len(read) == 36


def test_a_truncated_shard_ends_a_fit_with_its_name(config: Path, packed: Path, refused: Callable[[int], str]) -> None:
    whole = (packed / "train-2.tar").read_bytes()
    (packed / "train-2.tar").write_bytes(whole[: len(whole) // 2])
    assert "shards/train-2.tar is damaged or cut off after" in refused(main(["fit", *SMALL, "-c", str(config)]))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("none/*.tar", "nothing matches none/*.tar"), ("absent://a.tar", "absent://a.tar needs another package. Get it.")],
)
def test_shards_that_cannot_be_had_are_a_mistake(
    pattern: str, said: str, here: Path, refused: Callable[[int], str]
) -> None:
    fsspec.register_implementation("absent", "no_such_package.Files", clobber=True, errtxt="Get it")
    source = ["--data.source", "project.data.shards.Shards", "--data.source.train", pattern]
    assert said in refused(main(["fit", *SMALL, *source]))


def test_each_of_two_processes_reads_shards_of_its_own(config: Path) -> None:
    Path("count.py").write_text(READING)  # Lightning starts the second process with this file, too
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "count.py", "fit", *PLAIN, *SMALL, *STORED, *two, "-c", str(config)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == [(0, 36)]
    assert done.stdout.count("are read once, to find") == 1, "the second process finds what the first has kept"
    parts = {
        int(rank): [int(number) for number in numbers.split()]
        for rank, numbers in re.findall(r"rank (\d) has read ([\d ]*);", done.stdout)
    }
    assert parts == {0: [*range(18)], 1: [*range(18, 36)]}
