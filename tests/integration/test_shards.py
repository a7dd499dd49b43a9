"""Fits on tar shards: each image is read once, and later fits read none."""

import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from project import ImageClassifier, load
from project.cli.main import main
from project.data.sources.base import Sample
from project.data.sources.tar_index import ShardIndexer
from project.data.sources.webdataset import Shards
from tests.conftest import SMALL, STORED, row_counts
from tests.forked import run_ranks


def print_read() -> None:
    """Print the shards that a rank indexes, and the positions of the images that it has read."""
    read, content, build = set(), Shards.content, ShardIndexer.build

    def recorded_build(indexer: ShardIndexer, url: str) -> Any:
        print(f"indexed: {url}")
        return build(indexer, url)

    def recorded_content(source: Shards, sample: Sample) -> bytes:
        read.add(int(sample.name.rpartition("#")[2]))
        return content(source, sample)

    def report(model: ImageClassifier) -> None:
        print(f"rank {model.global_rank} has read {' '.join(map(str, sorted(read)))};")

    ShardIndexer.build = recorded_build  # type: ignore[method-assign]
    Shards.content = recorded_content  # type: ignore[method-assign]
    ImageClassifier.on_fit_end = report  # type: ignore[method-assign, assignment]


#: The figures of the dashboard would read a few dozen images.
NO_FIGURES = ["--dashboard.figures", "false"]


@pytest.fixture
def packed(here: Path, photos: Path) -> Path:
    """The photos in shards of six images, ``shards/{train,val}-N.tar``; labels are class names."""
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
    """A config whose source is the shards of train and val."""
    init = {"train": "shards/train-{0..3}.tar", "val": "shards/val-*.tar"}
    source = {"class_path": "project.data.shards.Shards", "init_args": init}
    path = packed.parent / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"source": source}, "model": {"weights": str(weights)}}))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each image is read, by the name of its sample."""
    counts: Counter[str] = Counter()
    read_content = Shards.content

    def content(self: Shards, sample: Sample) -> bytes:
        counts[sample.name] += 1
        return read_content(self, sample)

    monkeypatch.setattr(Shards, "content", content)
    return counts


def test_second_fit_reads_no_image(config: Path, reads: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, *STORED, "--trainer.max_epochs", "2", "-c", str(config)]
    assert main(["fit", *NO_FIGURES, *flags]) == 0
    out = capsys.readouterr().out
    assert "Shards: 6 of 6 are read once" in out
    assert row_counts(out) == [(0, 36)]
    assert len(reads) == reads.total() == 36
    reads.clear()
    assert main(["fit", *NO_FIGURES, *flags]) == 0
    out = capsys.readouterr().out
    assert "Shards:" not in out
    assert row_counts(out) == [(36, 0)]
    assert not reads
    assert load("runs/shards/version_1/checkpoints/best.ckpt").classes_ == ["blue", "green", "red"]


def test_all_views_of_an_image_are_computed_before_the_next_image(config: Path, reads: Counter[str]) -> None:
    order: list[int] = []
    read_content = Shards.content

    def content(self: Shards, sample: Sample) -> bytes:
        order.append(int(sample.name.rpartition("#")[2]))
        return read_content(self, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "content", content)
        flags = [*SMALL, *STORED, "--trainer.max_epochs", "2", "--data.augment", "flip", "--features.views", "2"]
        assert main(["fit", *NO_FIGURES, *flags, "-c", str(config)]) == 0
    assert order[:48] == [number for number in range(24) for _ in range(2)]


def test_val_is_held_out_of_train_shards(
    packed: Path, weights: Path, reads: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--data.source", "project.data.shards.Shards", "--data.source.train", "shards/train-*.tar"]
    flags = [*SMALL, *STORED, *source, "--model.weights", str(weights), "--trainer.max_epochs", "1"]
    assert main(["fit", *NO_FIGURES, *flags]) == 0
    assert row_counts(capsys.readouterr().out) == [(0, 24)]
    reads.clear()
    assert main(["fit", *NO_FIGURES, *flags]) == 0
    assert not reads
    assert main(["check", *source]) == 0
    assert "24 images (24 train) of 3 classes" in capsys.readouterr().out


def test_images_are_read_without_a_feature_cache(config: Path, reads: Counter[str]) -> None:
    flags = [*SMALL, "--features.cache", "off", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    assert main(["fit", *NO_FIGURES, *flags, "-c", str(config)]) == 0
    assert (
        main(["fit", *NO_FIGURES, *flags, "--data.num_workers", "2", "--trainer.max_epochs", "1", "-c", str(config)])
        == 0
    )
    assert len(reads) == 36


def test_truncated_shard_is_reported(config: Path, packed: Path, refused: Callable[[int], str]) -> None:
    content = (packed / "train-2.tar").read_bytes()
    (packed / "train-2.tar").write_bytes(content[: len(content) // 2])
    assert "shards/train-2.tar is damaged or truncated after" in refused(main(["fit", *SMALL, "-c", str(config)]))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("none/*.tar", "no file matches none/*.tar"), ("absent://a.tar", "absent://a.tar needs another package. Get it.")],
)
def test_unreachable_shards_are_a_user_error(
    pattern: str, message: str, here: Path, refused: Callable[[int], str]
) -> None:
    fsspec.register_implementation("absent", "no_such_package.Files", clobber=True, errtxt="Get it")
    source = ["--data.source", "project.data.shards.Shards", "--data.source.train", pattern]
    assert message in refused(main(["fit", *SMALL, *source]))


def test_each_of_two_ranks_reads_its_own_shards(config: Path) -> None:
    two_ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    flags = [*NO_FIGURES, *SMALL, *STORED, *two_ranks, "-c", str(config)]
    (code, output), (code_1, output_1) = run_ranks(Path().resolve(), ["fit", *flags], prepare=print_read)
    assert (code, code_1) == (0, 0), output + output_1
    assert row_counts(output) == [(0, 36)]
    indexed = re.findall(r"indexed: (.+)", output + output_1)
    assert len(set(indexed)) == 6
    assert len(indexed) < 12, "a rank loads what the other one has indexed, unless both index it at the same moment"
    parts = {
        int(rank): [int(number) for number in numbers.split()]
        for rank, numbers in re.findall(r"rank (\d) has read ([\d ]*);", output + output_1)
    }
    assert parts == {0: [*range(18)], 1: [*range(18, 36)]}
