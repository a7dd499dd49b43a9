"""WebDataset tar shards as a source, for data sets that are larger than a disk."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from project.data.sources.base import Finding, Sample, quote_names
from project.data.sources.files import Files
from project.data.sources.findings import class_findings, name_findings
from project.data.sources.remote import ByteRange, RangeReader, expand_urls, folder_name
from project.data.sources.tar_index import ROW, ShardContents, ShardIndexer
from project.errors import ConfigError, DataError
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.distributed import environment_rank
from project.runtime.system import cache_folder, cores

STAMP_THREADS = 32  # remote stores are slow to answer


class Shards(Files):
    """WebDataset tar shards of image files, local or at any URL that fsspec supports.

    The members of a sample are consecutive and differ only by extension: ``0001.jpg``, ``0001.cls``. Each shard is read
    once as a stream to build its index, which is cached in the user's cache folder until the shard changes. After that,
    images are read at random, and their SHA-256 is known without reading them.

    An image takes about 200 bytes of memory plus the names of its shard and member, and 50 % more while the source is
    prepared. Nothing else grows with the data set.

    The name of a sample is ``SHARD/MEMBER#NUMBER``, where NUMBER is its index among all images of the source.

    Args:
        train: Training shards: ``s3://bucket/train-{0000..0099}.tar``, ``shards/train-*.tar``, or a list of patterns.
        val: Validation shards. Without them, images are held out from train, which reads train once more.
        test: Test shards.
        image: Extensions of the image, separated by semicolons; the first that a sample has is used.
        label: Extension of the label file, which contains the number or the name of the class. A file whose extension
            ends in json may also contain an object with the key ``label``. If it is empty, images need no label, and
            all belong to the class ``image``.
        classes: Class names; labels that are numbers are indices into them. By default the labels that occur.

    Raises:
        ConfigError: There are no training shards.
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
            raise ConfigError("data.source: no training shards. Pass them with data.source.train.")
        self._train = train
        self._patterns = {"train": train, "val": val, "test": test}
        self._extensions = image, label
        self._given_classes = classes

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # a cached property can be set too
        """Name of the folder of the first shard. The folder is listed only if its name has a wildcard."""
        with _require_extra():
            return folder_name(self._train) or "shards"

    def _prepare(self) -> None:
        with _require_extra():
            urls = {split: expand_urls(patterns) for split, patterns in self._patterns.items() if patterns}
        self._urls = [url for split_urls in urls.values() for url in split_urls]
        repeated = [url for url, count in Counter(self._urls).items() if count > 1]
        if repeated:
            raise ConfigError(f"data.source: shards are given twice: {quote_names(repeated)}. List each shard once.")
        self._reader = RangeReader()
        image, label = self._extensions
        extensions = tuple(part.strip().lstrip(".").lower() for part in image.split(";") if part.strip(" ."))
        indexer = ShardIndexer(extensions, label.strip().lstrip(".").lower(), cache_folder() / "shards")
        shards, shard_findings = _index_shards(indexer, self._urls)
        self._starts = np.cumsum([0, *(len(shard.rows) for shard in shards)])
        self._rows = np.concatenate([shard.rows for shard in shards])
        self.classes = tuple(self._given_classes or _sort_labels({label for shard in shards for label in shard.labels}))
        self._set_samples(urls, dict(zip(self._urls, shards, strict=True)), shard_findings)

    def _set_samples(
        self, urls: Mapping[str, Sequence[str]], shards: Mapping[str, ShardContents], shard_findings: Iterable[Finding]
    ) -> None:
        """Set splits and findings, given the URLs of each split and the index of each URL."""
        class_index = {name: number for number, name in enumerate(self.classes)}
        bad: dict[str, list[str]] = defaultdict(list)
        unknown: dict[str, list[str]] = defaultdict(list)
        splits: dict[str, list[Sample]] = {}
        number = 0
        for split, split_urls in urls.items():
            splits[split] = []
            for url in split_urls:
                shard = shards[url]
                for reason, keys in shard.bad.items():
                    bad[reason] += [f"{url}/{key}" for key in keys]
                labels = [_label_index(label, class_index) for label in shard.labels]
                for name, code in zip(shard.names, shard.rows["label"].tolist(), strict=True):
                    label = labels[code]
                    if label is None:
                        unknown[shard.labels[code]].append(f"{url}/{name}")
                    else:
                        splits[split].append(Sample(f"{url}/{name}#{number}", label))
                    number += 1
        self.splits = splits
        self.findings = (
            *shard_findings,
            *_sample_findings(bad, unknown, self.classes),
            *_label_findings(self.classes),
            *class_findings("data.source", self.classes, splits),
            *name_findings(self.classes),
        )

    def content(self, sample: Sample) -> bytes:
        """Read the bytes of an image out of its shard."""
        url, begin, end = self._byte_range(sample)
        content = self._reader.read(url, begin, end)
        if len(content) != end - begin:
            raise DataError(f"{sample.name} is truncated: its shard has changed since it was indexed. Run again.")
        return content

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Start to read remote images in the background."""
        self._reader.prefetch(map(self._byte_range, samples))

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 of the image, from the index."""
        return bytes(self._rows["digest"][self._row(sample)])

    def stamp(self, sample: Sample) -> None:
        """``None``: :meth:`digest` makes it unnecessary."""

    def _byte_range(self, sample: Sample) -> ByteRange:
        row = self._row(sample)
        url = self._urls[int(np.searchsorted(self._starts, row, side="right")) - 1]
        begin = int(self._rows["offset"][row])
        return url, begin, begin + int(self._rows["size"][row])

    @staticmethod
    def _row(sample: Sample) -> int:
        return int(sample.name.rpartition("#")[2])


@contextmanager
def _require_extra() -> Iterator[None]:
    """Convert a missing package to an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("braceexpand", "fsspec"):  # a missing client of a store is reported elsewhere
            raise
        raise DataError(f"Tar shards need {error.name}: pip install 'frozen-backbone[shards]'") from error


EMPTY = ShardContents(np.zeros(0, ROW), [], [], {})


def _index_shards(indexer: ShardIndexer, urls: Sequence[str]) -> tuple[list[ShardContents], list[Finding]]:
    """Load the cached index of each shard, or build it. A shard that cannot be read is empty and has a finding."""
    with ThreadPoolExecutor(STAMP_THREADS) as pool:
        indices = dict(zip(urls, pool.map(indexer.load, urls), strict=True))
    missing = [url for url in urls if indices[url] is None]
    if missing:
        print_rank_zero(f"Shards: {len(missing)} of {len(urls)} are read once to build their index")
    # Ranks launched by torchrun or a cluster start at different shards, and load the indices that others have built.
    rank, world_size = environment_rank()
    start = len(missing) * rank // world_size
    order = missing[start:] + missing[:start]
    findings: dict[str, Finding] = {}
    cache_errors: list[OSError] = []

    def load_or_build(url: str) -> ShardContents:
        try:
            contents = indexer.load(url) if world_size > 1 else None
            if contents is None:
                contents, cache_error = indexer.build(url)
                cache_errors.extend([cache_error] if cache_error else [])
            return contents
        except DataError as error:
            findings[url] = Finding("refused", "bad shard", str(error), (url,))
            return EMPTY

    with progress_counter("Shards") as on_progress, ThreadPoolExecutor(cores()) as pool:
        for done, (url, contents) in enumerate(zip(order, pool.map(load_or_build, order), strict=True), 1):
            indices[url] = contents
            on_progress(done, len(order))
    if cache_errors:
        print_rank_zero(f"Shards: the index cannot be cached and is rebuilt in each run: {cache_errors[0]}")
    return [indices[url] or EMPTY for url in urls], [findings[url] for url in urls if url in findings]


def _sort_labels(labels: Iterable[str]) -> list[str]:
    """Sort labels numerically if all are integers, else alphabetically."""
    labels = list(labels)
    return sorted(labels, key=int) if all(map(_is_integer, labels)) else sorted(labels)


def _is_integer(label: str) -> bool:
    return len(label) < 10 and label.removeprefix("-").isdecimal()


def _label_index(label: str, class_index: Mapping[str, int]) -> int | None:
    """Index of the class with this name, or else with this number; ``None`` if there is none."""
    if label in class_index:
        return class_index[label]
    return int(label) if _is_integer(label) and 0 <= int(label) < len(class_index) else None


def _label_findings(classes: Sequence[str]) -> Iterator[Finding]:
    """Find labels that are unlikely to be classes."""
    numbers = [name for name in classes if _is_integer(name)]
    if 0 < len(numbers) < len(classes):
        words = [name for name in classes if not _is_integer(name)]
        text = (
            f"Some labels are numbers ({quote_names(numbers)}), others are names ({quote_names(words)}). "
            "Check that each class has one label."
        )
        yield Finding("problem", "mixed labels", text)
    if len({int(name) for name in numbers}) < len(numbers):
        text = f"Some of the labels {quote_names(numbers)} are the same number. Write each number in one way."
        yield Finding("problem", "mixed labels", text)
    if any(int(name) < 0 for name in numbers):
        text = f"Negative labels are treated as classes: {quote_names(numbers)}. Remove samples that are unlabeled."
        yield Finding("problem", "negative label", text)


def _sample_findings(
    bad: Mapping[str, Sequence[str]], unknown: Mapping[str, Sequence[str]], classes: Sequence[str]
) -> Iterator[Finding]:
    for reason, names in bad.items():
        text = f"data.source: {len(names)} samples are skipped or incomplete; each {reason}: {quote_names(names)}."
        yield Finding("problem", "bad sample", text, tuple(names))
    if unknown:
        names = [name for members in unknown.values() for name in members]
        text = (
            f"data.source: {len(names)} samples have a label that is not one of the {len(classes)} classes: "
            f"{quote_names(unknown)}. Add it to classes, or correct {quote_names(names)}."
        )
        yield Finding("refused", "unknown class", text, tuple(names))
