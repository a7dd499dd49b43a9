"""The images of a source under other labels: a second task on the same features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from project.data.sources.base import Sample, Source, quote_names
from project.data.sources.findings import class_findings
from project.errors import DataError, nearest


class Relabeled(Source):
    """The classes of a source, put together into groups.

    The images stay the same to the byte, so stored features of them are reused.

    Args:
        source: Has the images; it is not changed.
        groups: Name of each new class, and the classes that it is made of. Images of all others are left out.

    Raises:
        DataError: A class is in two groups.
    """

    def __init__(self, source: Source, groups: Mapping[str, Sequence[str]]) -> None:
        members = [name for names in groups.values() for name in names]
        twice = sorted({name for name in members if members.count(name) > 1})
        if twice:
            raise DataError(f"Classes in more than one group: {quote_names(twice)}.")
        self._source = source
        self._groups = groups

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the source, and of the groups."""
        return "-".join([self._source.name, *self._groups])

    def _prepare(self) -> None:
        source = self._source
        for name in (name for names in self._groups.values() for name in names):
            if name not in source.classes:
                raise DataError(f"{source.name} has no class {name!r}. {nearest(name, source.classes)}")
        label = {source.classes.index(name): at for at, names in enumerate(self._groups.values()) for name in names}
        self.classes = tuple(self._groups)
        self.splits = {
            split: [sample._replace(label=label[sample.label]) for sample in samples if sample.label in label]
            for split, samples in source.splits.items()
        }
        self.findings = (*source.findings, *class_findings(self.name, self.classes, self.splits))

    @property
    def decoder(self) -> type[Source]:
        """That of the source: its stored features are those of these images."""
        return self._source.decoder

    def content(self, sample: Sample) -> bytes:
        """As the source."""
        return self._source.content(sample)

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """As the source."""
        return self._source.decode(content, sample, min_size)

    def read(self, sample: Sample, min_size: int = 0) -> Image.Image:
        """As the source."""
        return self._source.read(sample, min_size)

    def stamp(self, sample: Sample) -> str | None:
        """As the source."""
        return self._source.stamp(sample)

    def digest(self, sample: Sample) -> bytes | None:
        """As the source."""
        return self._source.digest(sample)

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """As the source."""
        self._source.prefetch(samples)


regrouped = Relabeled  # the name in notebooks of before
