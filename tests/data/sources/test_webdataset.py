"""Tar shards as a source: found in one pass, kept, read by place; damage is told by name."""

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


def indexed(*arguments: Any, **options: Any) -> Shards:
    """Shards whose index is read."""
    source = Shards(*arguments, **options)
    source.prepare()
    return source


def png(seed: int) -> bytes:
    """A small image of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(members: Members) -> bytes:
    """A tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def samples(begin: int, end: int, label: Callable[[int], str] = lambda n: str(n % 2)) -> list[tuple[str, bytes]]:
    """Members of samples: an image and a label each."""
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
def _no_index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """A file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is opened as a stream; what is read of it by place goes by ``cat_file``."""
    counts: Counter[str] = Counter()
    for kind in (LocalFileSystem, MemoryFileSystem):

        def count(self: Any, path: str, mode: str = "rb", real: Any = kind.open, **more: Any) -> Any:
            counts[Path(path).name] += mode == "rb"
            return real(self, path, mode, **more)

        monkeypatch.setattr(kind, "open", count)
        monkeypatch.setattr(kind, "cat_file", lambda self, path, start=None, end=None: _part(self, path, start, end))
    return counts


def _part(files: Any, path: str, start: int | None, end: int | None) -> bytes:
    whole = files.store[path].getvalue() if isinstance(files, MemoryFileSystem) else Path(path).read_bytes()
    return bytes(whole[start:end])


def refused(source: Source) -> list[str]:
    return [finding.text for finding in source.findings if finding.level == "refused"]


def problems(source: Source) -> list[str]:
    return [finding.text for finding in source.findings if finding.level == "problem"]


def check(source: Source, split: str, seeds: Sequence[int]) -> None:
    """Images of a split are those drawn with these seeds, in order."""
    assert [source.content(sample) for sample in source.splits[split]] == [png(seed) for seed in seeds]


@pytest.mark.parametrize("pattern", ["shards/{0..2}.tar", "shards/*.tar", ["shards/0.tar", "shards/{1,2}.tar"]])
def test_local_shards_have_all_images_in_order(shards: str, pattern: str | list[str]) -> None:
    source = indexed(pattern)
    check(source, "train", range(12))
    assert source.classes == ("0", "1")
    assert [sample.label for sample in source.splits["train"]] == [0, 1] * 6
    assert source.splits["train"][5].name.endswith("shards/1.tar/0005.png#5")
    assert source.name == "shards"
    assert not source.findings
    pixels = np.asarray(source.read(source.splits["train"][3]))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(png(3)))))


@pytest.mark.parametrize("pattern", ["memory://bucket/train-{000..001}.tar", "memory://bucket/train-*.tar"])
def test_remote_shards_go_by_fsspec(memory: MemoryFileSystem, pattern: str) -> None:
    for n in range(2):
        memory.pipe(f"/bucket/train-00{n}.tar", tar(samples(3 * n, 3 * n + 3)))
    memory.pipe("/bucket/val.tar", tar(samples(10, 14)))
    memory.pipe("/bucket/test.tar", tar(samples(20, 22)))
    source = indexed(pattern, val="memory://bucket/val.tar", test="memory://bucket/test.tar")
    check(source, "train", range(6))
    check(source, "val", range(10, 14))
    check(source, "test", range(20, 22))
    check(pickle.loads(pickle.dumps(source)), "train", range(6))


def test_what_webdataset_writes_is_read(here: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8)
    with webdataset.TarWriter("a.tar") as writer:
        for n in range(4):
            writer.write({"__key__": f"some/where/{n}", "png": pixels, "cls": n % 2, "json": {"label": f"class {n}"}})
    source = indexed("a.tar")
    assert [sample.label for sample in source.splits["train"]] == [0, 1, 0, 1]
    np.testing.assert_array_equal(np.asarray(source.read(source.splits["train"][2])), pixels)
    assert indexed("a.tar", label="json").classes == tuple(f"class {n}" for n in range(4))


@pytest.mark.parametrize(
    ("label", "classes", "known", "labels"),
    [
        (lambda n: str(9 + n), None, ("9", "10", "11"), [0, 1, 2]),
        (lambda n: f"{'cba'[n]}\n", None, ("a", "b", "c"), [2, 1, 0]),
        (lambda n: str(n), ["cat", "dog", "elk"], ("cat", "dog", "elk"), [0, 1, 2]),
        (lambda n: ["elk", "cat", "1"][n], ["cat", "dog", "elk"], ("cat", "dog", "elk"), [2, 0, 1]),
    ],
    ids=["numbers", "names", "numbers of classes", "names and numbers of classes"],
)
def test_labels(
    label: Callable[[int], str], classes: list[str] | None, known: tuple[str, ...], labels: list[int], here: Path
) -> None:
    (here / "a.tar").write_bytes(tar(samples(0, 3, label)))
    source = indexed("a.tar", classes=classes)
    assert source.classes == known
    assert [sample.label for sample in source.splits["train"]] == labels
    assert not source.findings


def test_a_label_in_json_is_a_number_or_a_name(here: Path) -> None:
    labels = [{"label": 1}, {"label": "cat"}, {"label": None}, {}, "dog", [1], True]
    members = [(f"{n}.{k}", v) for n, one in enumerate(labels) for k, v in (("png", png(n)), ("json", dumped(one)))]
    (here / "a.tar").write_bytes(tar([*members, ("8.png", png(8)), ("8.json", b"{")]))
    source = indexed("a.tar", label="json", classes=["cat", "dog"])
    assert [sample.label for sample in source.splits["train"]] == [1, 0, 1]
    (problem,) = problems(source)
    assert (
        problem.startswith("data.source: 5 samples are skipped or incomplete")
        and names("2", "3", "5", "6", "8") in problem
    )


def names(*keys: str) -> str:
    return ", ".join(repr(str(Path(f"a.tar/{key}").absolute())) for key in keys)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_second_run_reads_no_shard(shards: str, opened: Counter[str]) -> None:
    first = indexed(shards)
    assert opened == {"0.tar": 1, "1.tar": 1, "2.tar": 1}
    second = indexed(shards)
    assert opened.total() == 3
    assert second.splits == first.splits
    check(second, "train", range(12))


def test_a_second_run_reads_no_remote_shard(memory: MemoryFileSystem, opened: Counter[str]) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    for _ in range(2):
        indexed("memory://b/a.tar")
    assert opened == {"a.tar": 1}
    memory.pipe("/b/a.tar", tar(samples(4, 8)))
    check(indexed("memory://b/a.tar"), "train", range(4, 8))
    assert opened == {"a.tar": 2}


def test_a_changed_shard_alone_is_read_again(shards: str, opened: Counter[str]) -> None:
    indexed(shards)
    Path("shards/1.tar").write_bytes(tar(samples(20, 24)))
    check(indexed(shards), "train", [0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11])
    assert opened == {"0.tar": 1, "1.tar": 2, "2.tar": 1}


def test_processes_begin_at_shards_of_their_own_and_find_what_others_have_kept(
    shards: str, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = ShardIndexer.read

    def read(self: ShardIndexer, url: str) -> Any:
        order.append(Path(url).name)
        if len(order) == 1:  # meanwhile, the other process
            monkeypatch.setenv("RANK", "0")
            indexed("shards/0.tar")
        return real(self, url)

    monkeypatch.setattr(ShardIndexer, "read", read)
    monkeypatch.setattr("project.data.sources.webdataset.cores", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(indexed(shards), "train", range(12))
    assert order == ["1.tar", "0.tar", "2.tar"]
    assert opened.total() == 3


def test_another_label_is_read_anew(shards: str, opened: Counter[str]) -> None:
    indexed(shards)
    assert "no label: no member .json" in problems(indexed(shards, label="json"))[0]
    assert opened.total() == 6


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: whole[:-9] + bytes(9)])
def test_a_damaged_index_is_made_anew(shards: str, opened: Counter[str], damage: Callable[[bytes], bytes]) -> None:
    indexed(shards)
    kept = list((cache_folder() / "shards").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(damage(kept[0].read_bytes()))
    for _ in range(2):
        check(indexed(shards), "train", range(12))
    assert opened.total() == 4


def test_an_index_that_cannot_be_kept_is_done_without(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache_folder().parent.mkdir(exist_ok=True)
    cache_folder().write_text("in the way")
    check(indexed(shards), "train", range(12))
    assert "is not kept, and has to be found again in each run" in capsys.readouterr().out


def test_a_shard_whose_changes_cannot_be_known_is_read_in_each_run(
    memory: MemoryFileSystem, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"name": path, "size": 1, "type": "file"})
    for _ in range(2):
        indexed("memory://b/a.tar")
    assert opened == {"a.tar": 2}


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2 - 700]


def between(whole: bytes) -> bytes:
    """Cut behind the second sample."""
    return whole[: tarfile.open(fileobj=io.BytesIO(whole)).getmembers()[4].offset]


def overwritten(whole: bytes) -> bytes:
    """With garbage in place of the header of the third sample."""
    at = len(between(whole))
    return whole[:at] + b"x" * 512 + whole[at + 512 :]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "1.tar is damaged or cut off after 000"),
        (between, "1.tar is damaged or cut off after 0005.cls"),
        (overwritten, "1.tar is damaged or cut off after 0005.cls"),
        (lambda whole: b"", "1.tar is damaged or cut off after its beginning"),
        (lambda whole: b"<html>" * 200, "1.tar is damaged or cut off after its beginning"),
        (gzip.compress, r"1.tar is compressed \(gzip\).* Unpack it"),
    ],
    ids=["cut", "cut between members", "overwritten", "empty", "no tar", "gzip"],
)
def test_a_spoilt_shard_is_named(shards: str, spoil: Callable[[bytes], bytes], said: str) -> None:
    Path("shards/1.tar").write_bytes(spoil(Path("shards/1.tar").read_bytes()))
    for _ in range(2):
        source = indexed(shards)
        check(source, "train", [0, 1, 2, 3, 8, 9, 10, 11])
        with pytest.raises(DataError, match=said):
            source.require()


def test_all_spoilt_shards_are_told(shards: str) -> None:
    for n in range(3):
        Path(f"shards/{n}.tar").write_bytes(b"")
    found = indexed(shards).findings
    assert [finding.kind for finding in found] == ["bad shard"] * 3 + ["no train"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("shards/{0..3}.tar", "there is no /.*/shards/3.tar"),
        ("none/*.tar", r"nothing matches none/\*.tar"),
        ("memory://none/0.tar", "there is no memory://none/0.tar"),
        ("nowhere://a/0.tar", "nowhere://a/0.tar cannot be read: Protocol not known: nowhere"),
        ("shards", r"/shards is a folder, not a tar file. Name the files in it: /.*/shards/\*.tar"),
    ],
)
def test_a_missing_shard_is_named(shards: str, pattern: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        indexed(pattern).require()


def test_wrong_patterns_are_refused(shards: str) -> None:
    with pytest.raises(ConfigError, match=r"braces of 'shards/\{0..2.tar' are not in pairs"):
        indexed("shards/{0..2.tar")
    with pytest.raises(ConfigError, match=r"shards/1.tar' are named twice"):
        indexed(shards, val="shards/1.tar")
    with pytest.raises(ConfigError, match="name the shards to train on"):
        indexed("")


def test_a_missing_package_is_named(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(DataError, match=r"pip install 'frozen-backbone\[shards\]'"):
        indexed(shards)


def test_bad_samples_are_left_out_and_told(here: Path) -> None:
    members = [
        *samples(0, 4),
        *[("7.png", png(7)), ("8.cls", b"1"), ("9.png", png(9)), ("9.cls", b" ")],
        *[("10.png", png(10)), ("10.cls", b"0"), ("10.png", png(11))],
        *[("0001.png", png(12)), ("0001.cls", b"1")],
        ("__meta__.json", b"{}"),
    ]
    (here / "a.tar").write_bytes(tar(members))
    source = indexed("a.tar")
    check(source, "train", [0, 1, 2, 3, 10])
    assert not refused(source)
    said = "\n".join(problems(source))
    for words in (
        f"each has no label: no member .cls: {names('7')}",
        f"each has no image: no member .jpg or .jpeg or .png or .webp: {names('8')}",
        f"each has no label: {names('9')}",
        f"each has a member twice, of which the first is taken: {names('10.png')}",
        f"each has the key of another before it: {names('0001')}",
    ):
        assert words in said


def test_an_unknown_class_is_refused(here: Path) -> None:
    (here / "a.tar").write_bytes(tar(samples(0, 6, lambda n: ["0", "1", "2", "-1", "cta", "cat"][n])))
    source = indexed("a.tar", classes=["cat", "dog"])
    (text,) = refused(source)
    assert "3 samples have a label that is none of the 2 classes: '2', '-1', 'cta'" in text
    assert "a.tar/0002.png" in text
    check(source, "train", [0, 1, 5])
    with pytest.raises(DataError, match="none of the 2 classes"):
        source.require()


def test_rows_of_a_folder_are_those_of_its_shards(here: Path) -> None:
    for n in range(2):
        (here / f"photos/{n}").mkdir(parents=True)
        (here / f"photos/{n}/a.png").write_bytes(png(n))
    (here / "a.tar").write_bytes(tar(samples(0, 2)))
    transform = evaluation(Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3))
    keys = []
    for source in (Folder("photos"), indexed("a.tar")):
        (images,) = image_views(source, source.splits["train"], all_digests(source), transform, [""])
        keys.append([image.key for image in images])
    assert keys[0] == keys[1]


def all_digests(source: Source) -> np.ndarray:
    return digest_images(source, source.splits["train"], ProcessGroup())


def test_digests_are_known_without_reading(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = indexed(shards)
    read = digest_images(Pathless(source), source.splits["train"], ProcessGroup())
    monkeypatch.setattr(Shards, "content", None)
    assert np.array_equal(all_digests(source), read)


class Pathless(Files):
    """A source that knows no digests."""

    def __init__(self, other: Source) -> None:
        self.content = other.content  # type: ignore[method-assign]


def test_a_shard_that_changes_meanwhile_is_named(shards: str) -> None:
    source = indexed(shards)
    Path("shards/2.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"2.tar/0011.png#11 ends too soon"):
        source.content(source.splits["train"][11])


def test_a_shard_is_never_held_whole(here: Path) -> None:
    large = np.random.default_rng(0).bytes(2**20)
    with tarfile.open("a.tar", "w") as archive:
        for n in range(64):
            for name, content in ((f"{n}.jpg", large), (f"{n}.cls", b"%d" % (n % 2)), (f"{n}.other", large)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    indexed("a.tar", label="none")  # what is imported for the first time is not counted
    tracemalloc.start()
    source = indexed("a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.splits["train"]) == 64
    assert peak < 2**20, "of 128 MiB"


def test_an_image_takes_few_bytes_of_memory(here: Path) -> None:
    count = 4000
    (here / "a.tar").write_bytes(
        tar([m for n in range(count) for m in ((f"{n:08d}.jpg", b"x"), (f"{n:08d}.cls", b"0"))])
    )
    indexed("a.tar")
    tracemalloc.start()
    source = indexed("a.tar")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source.splits["train"]) == count
    assert held / count < 300


@pytest.fixture
def asked(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which bytes of files in memory are asked for; windows are small."""
    parts: list[tuple[int, int]] = []
    real = MemoryFileSystem.cat_file

    def cat_file(files: Any, path: str, start: int, end: int) -> bytes:
        parts.append((start, end))
        return bytes(real(files, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(remote, "WINDOW", 4096)
    monkeypatch.setattr(remote, "GAP", 2048)
    return parts


def test_what_is_read_in_order_is_read_ahead(memory: MemoryFileSystem, asked: list[tuple[int, int]]) -> None:
    whole = tar(samples(0, 100))
    memory.pipe("/b/a.tar", whole)
    source = indexed("memory://b/a.tar")
    asked.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.content, source.splits["train"])) == [png(n) for n in range(100)]
    assert len(asked) <= len(whole) // 4096 + 8, "a request a window, not an image"
    asked.clear()
    source = pickle.loads(pickle.dumps(source))
    assert [source.content(sample) for sample in source.splits["train"][::-17]] == [png(n) for n in range(99, -1, -17)]
    assert [end - begin for begin, end in asked] == [len(png(n)) for n in range(99, -1, -17)], "what jumps is not"


def test_a_window_that_cannot_be_read_is_asked_for_again(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    source = indexed("memory://b/a.tar")
    first, second, *_ = source.splits["train"]
    source.content(first)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", lambda *arguments: 1 / 0)
        with pytest.raises(DataError, match=r"memory://b/a.tar cannot be read: division by zero"):
            source.content(second)
    assert source.content(second) == png(1)


def test_a_server_that_gives_whole_files_only_is_told(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 4)))
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda files, path, *part: files.store[path].getvalue())
    with pytest.raises(DataError, match=r"the server of memory://b/a.tar gives no parts of files"):
        indexed("memory://b/a.tar").require()


def test_images_of_a_batch_are_under_way_at_once(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/b/a.tar", tar(samples(0, 8)))
    data = ImageDataModule(source=indexed("memory://b/a.tar"), batch_size=8, num_workers=0, val_fraction=0)
    data.preprocessing = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    together = threading.Barrier(8)
    real = MemoryFileSystem.cat_file

    def cat_file(files: Any, path: str, start: int, end: int) -> bytes:
        together.wait(10)  # breaks unless all eight come
        return bytes(real(files, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    ((images, labels, _),) = data.train_dataloader()
    assert images.shape == (8, 3, 16, 16)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["0", "1", "two"], "Some labels are numbers ('0', '1'), others words ('two')"),
        (["0", "1", "01"], "some are the same number"),
        (["0", "1", "-1"], "A label below 0 is a class here"),
        (["0", "1", "9" * 5000], "Some labels are numbers"),
    ],
)
def test_labels_that_can_hardly_all_be_classes_are_problems(labels: list[str], said: str, here: Path) -> None:
    Path("a.tar").write_bytes(tar(samples(0, 9, lambda n: labels[n % 3])))
    found = indexed("a.tar").findings
    assert any(said in finding.text for finding in found if finding.level == "problem")
    assert not any(finding.kind == "similar names" for finding in found)
