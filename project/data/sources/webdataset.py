"""Sets that are larger than a disk: WebDataset's tar shards as a source."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from project.data.sources.base import Finding, Sample, quote_names
from project.data.sources.files import Files
from project.data.sources.findings import class_findings, name_findings
from project.data.sources.remote import ByteRange, RangeReader, expand, folder_name
from project.data.sources.tar_index import ROW, ShardContents, ShardIndexer
from project.errors import ConfigError, DataError
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.distributed import environment_rank
from project.runtime.system import cache_folder, cores

ASKED = 32  # shards at a time whose state is asked for: a store takes its time to answer


class Shards(Files):
    """Image files in tar shards, local or wherever fsspec finds them, as WebDataset has them.

    The members of a sample lie one after the other and differ by extension alone: ``0001.jpg``, ``0001.cls``. Each
    shard is read once as a stream, in order, to find what is in it and where; that is kept in the user's cache folder
    for as long as the shard does not change. From then on an image is read by its place in its shard, and its SHA-256
    is known without reading it. In memory an image takes about 200 bytes and the letters of its shard's and member's
    names, and half as many again while the source is made; nothing else grows with the set.

    A sample's name is ``SHARD/MEMBER#NUMBER``, its number being its place among all images of the source.

    Args:
        train: Shards to train on: ``s3://bucket/train-{0000..0099}.tar``, ``shards/train-*.tar``, or a list of such.
        val: Shards for validation; without any, images are held out of train, which has to be read once more for it.
        test: Shards for the test.
        image: Extensions of the image; the first that a sample has is taken.
        label: Extension of the label: a file that holds a class's number or its name; if it ends in json, it may have
            it as ``label``.
        classes: Names of the classes; labels that are numbers count them from 0. By default the labels themselves.

    Raises:
        ConfigError: No shards to train on are given.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        image: str = "jpg;jpeg;png;webp",
        label: str = "cls",
        classes: list[str] | None = None,
    ) -> None:
        if not train:
            raise ConfigError("data.source: name the shards to train on with train.")
        self._train = train
        self._patterns = {"train": train, "val": val, "test": test}
        self._members = image, label
        self._given_classes = classes

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # cached, so that it can be set as well
        """Name of the folder of the first shard; only one with a wildcard in it has to be looked up."""
        with _shards_extra():
            return folder_name(self._train) or "shards"

    def _prepare(self) -> None:
        with _shards_extra():
            urls = {split: expand(given) for split, given in self._patterns.items() if given}
        self._urls = [url for part in urls.values() for url in part]
        twice = [url for url, count in Counter(self._urls).items() if count > 1]
        if twice:
            raise ConfigError(f"data.source: {quote_names(twice)} are named twice. A shard is of one split.")
        self._parts = RangeReader()
        image, label = self._members
        extensions = tuple(part.strip().lstrip(".").lower() for part in image.split(";") if part.strip(" ."))
        indexer = ShardIndexer(extensions, label.strip().lstrip(".").lower(), cache_folder() / "shards")
        contents, bad = _contents(indexer, self._urls)
        self._starts = np.cumsum([0, *(len(one.rows) for one in contents)])
        self._rows = np.concatenate([one.rows for one in contents])
        self.classes = tuple(self._given_classes or _classes({label for one in contents for label in one.labels}))
        self._fill(urls, contents, bad)

    def _fill(self, urls: dict[str, list[str]], contents: Sequence[ShardContents], bad: Iterable[Finding]) -> None:
        """Make the samples and the findings."""
        index = {name: number for number, name in enumerate(self.classes)}
        left_out: dict[str, list[str]] = defaultdict(list)
        unknown: dict[str, list[str]] = defaultdict(list)
        splits: dict[str, list[Sample]] = {}
        number = 0
        each = iter(zip(self._urls, contents, strict=True))
        for split, part in urls.items():
            splits[split] = []
            for url, one in (next(each) for _ in part):
                for what, keys in one.bad.items():
                    left_out[what] += [f"{url}/{key}" for key in keys]
                labels = [_number(label, index) for label in one.labels]
                for name, code in zip(one.names, one.rows["label"].tolist(), strict=True):
                    label = labels[code]
                    if label is None:
                        unknown[one.labels[code]].append(f"{url}/{name}")
                    else:
                        splits[split].append(Sample(f"{url}/{name}#{number}", label))
                    number += 1
        self.splits = splits
        self.findings = (
            *bad,
            *_findings(left_out, unknown, self.classes),
            *_mixed(self.classes),
            *class_findings("data.source", self.classes, splits),
            *name_findings(self.classes),
        )

    def content(self, sample: Sample) -> bytes:
        """Read an image's bytes out of its shard; a :class:`~project.errors.DataError` names one that cannot be."""
        url, begin, end = self._part(sample)
        content = self._parts.read(url, begin, end)
        if len(content) != end - begin:
            raise DataError(f"{sample.name} ends too soon: its shard was changed since it was indexed. Run again.")
        return content

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Begin to read images that are not on this machine, all at once."""
        self._parts.prefetch(map(self._part, samples))

    def digest(self, sample: Sample) -> bytes:
        """What the index has."""
        return bytes(self._rows["digest"][self._row(sample)])

    def stamp(self, sample: Sample) -> None:
        """None is needed, as the digest is known."""

    def _part(self, sample: Sample) -> ByteRange:
        row = self._row(sample)
        url = self._urls[int(np.searchsorted(self._starts, row, side="right")) - 1]
        begin = int(self._rows["offset"][row])
        return url, begin, begin + int(self._rows["size"][row])

    @staticmethod
    def _row(sample: Sample) -> int:
        return int(sample.name.rpartition("#")[2])


@contextmanager
def _shards_extra() -> Iterator[None]:
    """Name the extra whose packages are missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("braceexpand", "fsspec"):  # the client of a store
            raise
        raise DataError(f"Tar shards need {error.name}: pip install 'frozen-backbone[shards]'") from error


NOTHING = ShardContents(np.zeros(0, ROW), [], [], {})


def _contents(indexer: ShardIndexer, urls: Sequence[str]) -> tuple[list[ShardContents], list[Finding]]:
    """What is in each shard: what is kept, if it is known; or else it is read, once. And which cannot be."""
    with ThreadPoolExecutor(ASKED) as pool:
        known = dict(zip(urls, pool.map(indexer.kept, urls), strict=True))
    lacking = [url for url in urls if known[url] is None]
    if lacking:
        print_rank_zero(f"Shards: {len(lacking)} of {len(urls)} are read once, to find what is in them")
    # Processes that torchrun or a cluster has started begin at shards of their own, and find what others have kept.
    rank, size = environment_rank()
    at = len(lacking) * rank // size
    findings: dict[str, Finding] = {}
    refusals: list[OSError] = []

    def read(url: str) -> ShardContents:
        try:
            found = indexer.kept(url) if size > 1 else None
            if found is None:
                found, refusal = indexer.read(url)
                refusals.extend([refusal] if refusal else [])
            return found
        except DataError as error:
            findings[url] = Finding("refused", "bad shard", str(error), (url,))
            return NOTHING

    with progress_counter("Shards") as show, ThreadPoolExecutor(cores()) as pool:
        turn = lacking[at:] + lacking[:at]
        for done, (url, found) in enumerate(zip(turn, pool.map(read, turn), strict=True), 1):
            known[url] = found
            show(done, len(turn))
    if refusals:
        print_rank_zero(f"Shards: what was found is not kept, and has to be found again in each run: {refusals[0]}")
    return [known[url] or NOTHING for url in urls], [findings[url] for url in urls if url in findings]


def _classes(labels: Iterable[str]) -> list[str]:
    """Classes in order: by number, if all are numbers."""
    labels = list(labels)
    return sorted(labels, key=int) if all(map(_is_number, labels)) else sorted(labels)


def _is_number(label: str) -> bool:
    return len(label) < 10 and label.removeprefix("-").isdecimal()


def _number(label: str, index: dict[str, int]) -> int | None:
    """The class that a label is of: the one of that name, or else of that number."""
    if label in index:
        return index[label]
    return int(label) if _is_number(label) and 0 <= int(label) < len(index) else None


def _mixed(classes: Sequence[str]) -> Iterator[Finding]:
    """Labels that can hardly all be meant as classes."""
    numbers = [name for name in classes if _is_number(name)]
    if 0 < len(numbers) < len(classes):
        words = [name for name in classes if not _is_number(name)]
        text = f"Some labels are numbers ({quote_names(numbers)}), others words ({quote_names(words)}): twice the same?"
        yield Finding("problem", "mixed labels", text)
    if len({int(name) for name in numbers}) < len(numbers):
        yield Finding("problem", "mixed labels", f"Of the labels {quote_names(numbers)} some are the same number.")
    if any(int(name) < 0 for name in numbers):
        yield Finding(
            "problem", "negative label", f"A label below 0 is a class here: {quote_names(numbers)}. Is it for no label?"
        )


def _findings(
    left_out: dict[str, list[str]], unknown: dict[str, list[str]], classes: Sequence[str]
) -> Iterator[Finding]:
    for what, names in left_out.items():
        text = f"data.source: {len(names)} samples are skipped or incomplete: each {what}: {quote_names(names)}."
        yield Finding("problem", "bad sample", text, tuple(names))
    if unknown:
        names = [name for part in unknown.values() for name in part]
        text = (
            f"data.source: {len(names)} samples have a label that is none of the {len(classes)} classes: "
            f"{quote_names(unknown)}. Add it to classes, or mend {quote_names(names)}."
        )
        yield Finding("refused", "unknown class", text, tuple(names))
