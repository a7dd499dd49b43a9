"""Shards: indexing, caching of the index, random access, damaged shards and labels."""

import gzip
import io
import json
import pickle
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from project.data.datamodule import ImageDataModule
from project.data.sources import remote
from project.data.sources.base import Source
from project.data.sources.files import Files
from project.data.sources.folder import Folder
from project.data.sources.tar_index import ShardIndexer
from project.data.sources.webdataset import Shards
from project.data.transforms import evaluation
from project.errors import ConfigError, DataError
from project.features.views import digest_images, image_views
from project.preprocessing import Preprocessing
from project.runtime.distributed import ProcessGroup
from project.runtime.system import cache_folder

Members = Sequence[tuple[str, bytes]]


def prepared(*arguments: Any, **options: Any) -> Shards:
    """A prepared source."""
    source = Shards(*arguments, **options)
    source.prepare()
    return source


def png(seed: int) -> bytes:
    """A small image of noise, encoded as PNG."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(members: Members) -> bytes:
    """Bytes of a tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def samples(begin: int, end: int, label: Callable[[int], str] = lambda n: str(n % 2)) -> list[tuple[str, bytes]]:
    """An image and a label member for each number."""
    return [
        member for n in range(begin, end) for member in ((f"{n:04d}.png", png(n)), (f"{n:04d}.cls", label(n).encode()))
    ]


@pytest.fixture
def shards(here: Path) -> str:
    """Three shards of four samples each, ``shards/{0..2}.tar``."""
    (here / "shards").mkdir()
    for n in range(3):
        (here / f"shards/{n}.tar").write_bytes(tar(samples(4 * n, 4 * n + 4)))
    return "shards/{0..2}.tar"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An empty fsspec file system in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened as a stream. Byte ranges are read without ``open``."""
    counts: Counter[str] = Counter()
    for kind in (LocalFileSystem, MemoryFileSystem):

        def count(self: Any, path: str, mode: str = "rb", real_open: Any = kind.open, **options: Any) -> Any:
            counts[Path(path).name] += mode == "rb"
            return real_open(self, path, mode, **options)

        monkeypatch.setattr(kind, "open", count)
        monkeypatch.setattr(
            kind, "cat_file", lambda self, path, start=None, end=None: _cat_file(self, path, start, end)
        )
    return counts


def _cat_file(files: Any, path: str, start: int | None, end: int | None) -> bytes:
    content = files.store[path].getvalue() if isinstance(files, MemoryFileSystem) else Path(path).read_bytes()
    return bytes(content[start:end])


def refused(source: Source) -> list[str]:
    return [finding.text for finding in source.findings if finding.level == "refused"]


def problems(source: Source) -> list[str]:
    return [finding.text for finding in source.findings if finding.level == "problem"]


def assert_images(source: Source, split: str, seeds: Sequence[int]) -> None:
    """Assert that the images of a split are those of these seeds, in order."""
    assert [source.content(sample) for sample in source.splits[split]] == [png(seed) for seed in seeds]


@pytest.mark.parametrize("pattern", ["shards/{0..2}.tar", "shards/*.tar", ["shards/0.tar", "shards/{1,2}.tar"]])
def test_local_shards_give_all_images_in_order(shards: str, pattern: str | list[str]) -> None:
    source = prepared(pattern)
    assert_images(source, "train", range(12))
    assert source.classes == ("0", "1")
    assert [sample.label for sample in source.splits["train"]] == [0, 1] * 6
    assert source.splits["train"][5].name.endswith("shards/1.tar/0005.png#5")
    assert source.name == "shards"
    assert not source.findings
    pixels = np.asarray(source.read(source.splits["train"][3]))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(png(3)))))


@pytest.mark.parametrize("pattern", ["memory://bucket/train-{000..001}.tar", "memory://bucket/train-*.tar"])
def test_remote_shards_are_read_through_fsspec(memory: MemoryFileSystem, pattern: str) -> None:
    for n in range(2):
        memory.pipe(f"/bucket/train-00{n}.tar", tar(samples(3 * n, 3 * n + 3)))
    memory.pipe("/bucket/val.tar", tar(samples(10, 14)))
    memory.pipe("/bucket/test.tar", tar(samples(20, 22)))
    source = prepared(pattern, val="memory://bucket/val.tar", test="memory://bucket/test.tar")
    assert_images(source, "train", range(6))
    assert_images(source, "val", range(10, 14))
    assert_images(source, "test", range(20, 22))
    assert_images(pickle.loads(pickle.dumps(source)), "train", range(6))


def test_shards_written_by_webdataset_are_read(here: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)
    with webdataset.TarWriter("a.tar") as writer:
        for n in range(4):
            writer.write({"__key__": f"some/where/{n}", "png": pixels, "cls": n % 2, "json": {"label": f"class {n}"}})
    source = prepared("a.tar")
    assert [sample.label for sample in source.splits["train"]] == [0, 1, 0, 1]
    np.testing.assert_array_equal(np.asarray(source.read(source.splits["train"][2])), pixels)
    assert prepared("a.tar", label="json").classes == tuple(f"class {n}" for n in range(4))


@pytest.mark.parametrize(
    ("label", "classes", "expected_classes", "expected_labels"),
    [
        (lambda n: str(9 + n), None, ("9", "10", "11"), [0, 1, 2]),
        (lambda n: f"{'cba'[n]}\n", None, ("a", "b", "c"), [2, 1, 0]),
        (lambda n: str(n), ["cat", "dog", "elk"], ("cat", "dog", "elk"), [0, 1, 2]),
        (lambda n: ["elk", "cat", "1"][n], ["cat", "dog", "elk"], ("cat", "dog", "elk"), [2, 0, 1]),
    ],
    ids=["numbers", "names", "class indices", "names and class indices"],
)
def test_labels_are_class_names_or_indices(
    label: Callable[[int], str],
    classes: list[str] | None,
    expected_classes: tuple[str, ...],
    expected_labels: list[int],
    here: Path,
) -> None:
    (here / "a.tar").write_bytes(tar(samples(0, 3, label)))
    source = prepared("a.tar", classes=classes)
    assert source.classes == expected_classes
    assert [sample.label for sample in source.splits["train"]] == expected_labels
    assert not source.findings


def test_json_label_is_a_number_or_a_name(here: Path) -> None:
    labels = [{"label": 1}, {"label": "cat"}, {"label": None}, {}, "dog", [1], True]
    members = [
        (f"{n}.{k}", v) for n, label in enumerate(labels) for k, v in (("png", png(n)), ("json", to_json(label)))
    ]
    (here / "a.tar").write_bytes(tar([*members, ("8.png", png(8)), ("8.json", b"{")]))
    source = prepared("a.tar", label="json", classes=["cat", "dog"])
    assert [sample.label for sample in source.splits["train"]] == [1, 0, 1]
    (problem,) = problems(source)
    assert (
        problem.startswith("data.source: 5 samples are skipped or incomplete")
        and paths("2", "3", "5", "6", "8") in problem
    )


def paths(*keys: str) -> str:
    return ", ".join(repr(str(Path(f"a.tar/{key}").absolute())) for key in keys)


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_cached_index_is_used_for_local_shards(shards: str, opened: Counter[str]) -> None:
    first = prepared(shards)
    assert opened == {"0.tar": 1, "1.tar": 1, "2.tar": 1}
    second = prepared(shards)
    assert opened.total() == 3
    assert second.splits == first.splits
    assert_images(second, "train", range(12))


def test_cached_index_is_used_for_remote_shards(memory: MemoryFileSystem, opened: Counter[str]) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    for _ in range(2):
        prepared("memory://b/a.tar")
    assert opened == {"a.tar": 1}
    memory.pipe("/b/a.tar", tar(samples(4, 8)))
    assert_images(prepared("memory://b/a.tar"), "train", range(4, 8))
    assert opened == {"a.tar": 2}


def test_only_a_changed_shard_is_indexed_again(shards: str, opened: Counter[str]) -> None:
    prepared(shards)
    Path("shards/1.tar").write_bytes(tar(samples(20, 24)))
    assert_images(prepared(shards), "train", [0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11])
    assert opened == {"0.tar": 1, "1.tar": 2, "2.tar": 1}


def test_ranks_start_at_different_shards_and_load_indices_of_others(
    shards: str, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_build = ShardIndexer.build

    def build(self: ShardIndexer, url: str) -> Any:
        order.append(Path(url).name)
        if len(order) == 1:  # meanwhile, the other rank indexes a shard
            monkeypatch.setenv("RANK", "0")
            prepared("shards/0.tar")
        return real_build(self, url)

    monkeypatch.setattr(ShardIndexer, "build", build)
    monkeypatch.setattr("project.data.sources.webdataset.cores", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_images(prepared(shards), "train", range(12))
    assert order == ["1.tar", "0.tar", "2.tar"]
    assert opened.total() == 3


def test_another_label_extension_needs_a_new_index(shards: str, opened: Counter[str]) -> None:
    prepared(shards)
    assert "no label: no member .json" in problems(prepared(shards, label="json"))[0]
    assert opened.total() == 6


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[:-9] + bytes(9)]
)
def test_damaged_index_is_rebuilt(shards: str, opened: Counter[str], damage: Callable[[bytes], bytes]) -> None:
    prepared(shards)
    files = list((cache_folder() / "shards").iterdir())
    assert len(files) == 3
    files[0].write_bytes(damage(files[0].read_bytes()))
    for _ in range(2):
        assert_images(prepared(shards), "train", range(12))
    assert opened.total() == 4


def test_shards_are_read_without_a_writable_cache(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache_folder().parent.mkdir(exist_ok=True)
    cache_folder().write_text("a file instead of a folder")
    assert_images(prepared(shards), "train", range(12))
    assert "the index cannot be cached and is rebuilt in each run" in capsys.readouterr().out


def test_shard_whose_changes_cannot_be_detected_is_indexed_in_each_run(
    memory: MemoryFileSystem, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"name": path, "size": 1, "type": "file"})
    for _ in range(2):
        prepared("memory://b/a.tar")
    assert opened == {"a.tar": 2}


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2 - 700]


def truncate_between_members(content: bytes) -> bytes:
    """Truncate after the second sample."""
    return content[: tarfile.open(fileobj=io.BytesIO(content)).getmembers()[4].offset]


def overwrite_header(content: bytes) -> bytes:
    """Overwrite the header of the third sample."""
    offset = len(truncate_between_members(content))
    return content[:offset] + b"x" * 512 + content[offset + 512 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "1.tar is damaged or truncated after 000"),
        (truncate_between_members, "1.tar is damaged or truncated after 0005.cls"),
        (overwrite_header, "1.tar is damaged or truncated after 0005.cls"),
        (lambda content: b"", "1.tar is damaged or truncated after its beginning"),
        (lambda content: b"<html>" * 200, "1.tar is damaged or truncated after its beginning"),
        (gzip.compress, r"1.tar is compressed \(gzip\).* Unpack it"),
    ],
    ids=["truncated", "truncated between members", "overwritten", "empty", "HTML", "gzip"],
)
def test_damaged_shard_is_reported(shards: str, damage: Callable[[bytes], bytes], message: str) -> None:
    Path("shards/1.tar").write_bytes(damage(Path("shards/1.tar").read_bytes()))
    for _ in range(2):
        source = prepared(shards)
        assert_images(source, "train", [0, 1, 2, 3, 8, 9, 10, 11])
        with pytest.raises(DataError, match=message):
            source.require()


def test_all_damaged_shards_are_reported(shards: str) -> None:
    for n in range(3):
        Path(f"shards/{n}.tar").write_bytes(b"")
    findings = prepared(shards).findings
    assert [finding.kind for finding in findings] == ["bad shard"] * 3 + ["no train"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("shards/{0..3}.tar", "/.*/shards/3.tar does not exist"),
        ("none/*.tar", r"no file matches none/\*.tar"),
        ("memory://none/0.tar", "memory://none/0.tar does not exist"),
        ("nowhere://a/0.tar", "nowhere://a/0.tar cannot be read: Protocol not known: nowhere"),
        ("shards", r"/shards is a folder, not a tar file. Pass the files in it: /.*/shards/\*.tar"),
    ],
)
def test_missing_shard_is_reported(shards: str, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(pattern).require()


def test_invalid_patterns_are_refused(shards: str) -> None:
    with pytest.raises(ConfigError, match=r"braces of 'shards/\{0..2.tar' do not match"):
        prepared("shards/{0..2.tar")
    with pytest.raises(ConfigError, match=r"given twice: '.*shards/1.tar'"):
        prepared(shards, val="shards/1.tar")
    with pytest.raises(ConfigError, match="no training shards"):
        prepared("")


def test_missing_package_names_the_extra_to_install(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(DataError, match=r"pip install 'frozen-backbone\[shards\]'"):
        prepared(shards)


def test_bad_samples_are_skipped_and_reported(here: Path) -> None:
    members = [
        *samples(0, 4),
        *[("7.png", png(7)), ("8.cls", b"1"), ("9.png", png(9)), ("9.cls", b" ")],
        *[("10.png", png(10)), ("10.cls", b"0"), ("10.png", png(11))],
        *[("0001.png", png(12)), ("0001.cls", b"1")],
        ("__meta__.json", b"{}"),
    ]
    (here / "a.tar").write_bytes(tar(members))
    source = prepared("a.tar")
    assert_images(source, "train", [0, 1, 2, 3, 10])
    assert not refused(source)
    text = "\n".join(problems(source))
    for expected in (
        f"each has no label: no member .cls: {paths('7')}",
        f"each has no image: no member .jpg or .jpeg or .png or .webp: {paths('8')}",
        f"each has an empty or invalid label: {paths('9')}",
        f"each has a repeated member, of which the first is used: {paths('10.png')}",
        f"each has the key of an earlier sample: {paths('0001')}",
    ):
        assert expected in text


def test_unknown_class_is_refused(here: Path) -> None:
    (here / "a.tar").write_bytes(tar(samples(0, 6, lambda n: ["0", "1", "2", "-1", "cta", "cat"][n])))
    source = prepared("a.tar", classes=["cat", "dog"])
    (text,) = refused(source)
    assert "3 samples have a label that is not one of the 2 classes: '2', '-1', 'cta'" in text
    assert "a.tar/0002.png" in text
    assert_images(source, "train", [0, 1, 5])
    with pytest.raises(DataError, match="not one of the 2 classes"):
        source.require()


def test_folder_and_shards_have_the_same_store_keys(here: Path) -> None:
    for n in range(2):
        (here / f"photos/{n}").mkdir(parents=True)
        (here / f"photos/{n}/a.png").write_bytes(png(n))
    (here / "a.tar").write_bytes(tar(samples(0, 2)))
    transform = evaluation(Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3))
    keys = []
    for source in (Folder("photos"), prepared("a.tar")):
        (images,) = image_views(source, source.splits["train"], train_digests(source), transform, [""])
        keys.append([image.key for image in images])
    assert keys[0] == keys[1]


def train_digests(source: Source) -> np.ndarray:
    return digest_images(source, source.splits["train"], ProcessGroup())


def test_digests_come_from_the_index(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = prepared(shards)
    computed = digest_images(WithoutDigests(source), source.splits["train"], ProcessGroup())
    monkeypatch.setattr(Shards, "content", None)
    assert np.array_equal(train_digests(source), computed)


class WithoutDigests(Files):
    """A source that has to read the images for their digests."""

    def __init__(self, other: Source) -> None:
        self.content = other.content  # type: ignore[method-assign]


def test_shard_that_changes_after_indexing_is_reported(shards: str) -> None:
    source = prepared(shards)
    Path("shards/2.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"2.tar/0011.png#11 is truncated"):
        source.content(source.splits["train"][11])


def test_indexing_does_not_load_a_whole_shard_into_memory(here: Path) -> None:
    large = np.random.default_rng(0).bytes(2**20)
    with tarfile.open("a.tar", "w") as archive:
        for n in range(64):
            for name, content in ((f"{n}.jpg", large), (f"{n}.cls", b"%d" % (n % 2)), (f"{n}.other", large)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    prepared("a.tar", label="none")  # imports are not to be counted
    tracemalloc.start()
    source = prepared("a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.splits["train"]) == 64
    assert peak < 2**20, "the shard has 128 MiB"


def test_an_image_takes_less_than_300_bytes_of_memory(here: Path) -> None:
    count = 4000
    (here / "a.tar").write_bytes(
        tar([m for n in range(count) for m in ((f"{n:08d}.jpg", b"x"), (f"{n:08d}.cls", b"0"))])
    )
    prepared("a.tar")
    tracemalloc.start()
    source = prepared("a.tar")
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source.splits["train"]) == count
    assert used / count < 300


@pytest.fixture
def requests(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Byte ranges that are requested of files in memory; windows are small."""
    ranges: list[tuple[int, int]] = []
    real_cat_file = MemoryFileSystem.cat_file

    def cat_file(files: Any, path: str, start: int, end: int) -> bytes:
        ranges.append((start, end))
        return bytes(real_cat_file(files, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "WINDOW_SIZE", 4096)
    monkeypatch.setattr(remote, "MAX_GAP", 2048)
    return ranges


def test_sequential_reads_are_read_ahead_and_random_reads_are_not(
    memory: MemoryFileSystem, requests: list[tuple[int, int]]
) -> None:
    content = tar(samples(0, 100))
    memory.pipe("/b/a.tar", content)
    source = prepared("memory://b/a.tar")
    requests.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.content, source.splits["train"])) == [png(n) for n in range(100)]
    assert len(requests) <= len(content) // 4096 + 8, "one request per window, not per image"
    requests.clear()
    source = pickle.loads(pickle.dumps(source))
    assert [source.content(sample) for sample in source.splits["train"][::-17]] == [png(n) for n in range(99, -1, -17)]
    assert [end - begin for begin, end in requests] == [len(png(n)) for n in range(99, -1, -17)], (
        "random reads fetch one image each"
    )


def test_failed_window_is_requested_again(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    source = prepared("memory://b/a.tar")
    first, second, *_ = source.splits["train"]
    source.content(first)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", lambda *arguments: 1 / 0)
        with pytest.raises(DataError, match=r"memory://b/a.tar cannot be read: division by zero"):
            source.content(second)
    assert source.content(second) == png(1)


def test_server_without_range_requests_is_reported(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda files, path, *part: files.store[path].getvalue())
    with pytest.raises(DataError, match=r"the server of memory://b/a.tar does not support range requests"):
        prepared("memory://b/a.tar").require()


def test_images_of_a_batch_are_requested_concurrently(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 8)))
    data = ImageDataModule(source=prepared("memory://b/a.tar"), batch_size=8, num_workers=0, val_fraction=0)
    data.preprocessing = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    barrier = threading.Barrier(8)
    real_cat_file = MemoryFileSystem.cat_file

    def cat_file(files: Any, path: str, start: int, end: int) -> bytes:
        barrier.wait(10)  # breaks unless all eight requests are concurrent
        return bytes(real_cat_file(files, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    ((images, labels, _),) = data.train_dataloader()
    assert images.shape == (8, 3, 16, 16)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1", "two"], "Some labels are numbers ('0', '1'), others are names ('two')"),
        (["0", "1", "01"], "are the same number"),
        (["0", "1", "-1"], "Negative labels are treated as classes"),
        (["0", "1", "9" * 5000], "Some labels are numbers"),
    ],
)
def test_ambiguous_labels_are_problems(labels: list[str], message: str, here: Path) -> None:
    Path("a.tar").write_bytes(tar(samples(0, 9, lambda n: labels[n % 3])))
    findings = prepared("a.tar").findings
    assert any(message in finding.text for finding in findings if finding.level == "problem")
    assert not any(finding.kind == "similar names" for finding in findings)
