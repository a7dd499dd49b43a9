"""A source with other labels: a second task on the same stored features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from project.data.sources.base import Sample, Source, quote_names
from project.data.sources.findings import class_findings
from project.errors import DataError, did_you_mean


class Relabeled(Source):
    """A source whose classes are merged into groups.

    The image bytes do not change, so stored features are reused.

    Args:
        source: The source of the images. It is not changed.
        groups: The classes of each new class, by its name. Images of all other classes are skipped.

    Raises:
        DataError: A class is in two groups.
    """

    def __init__(self, source: Source, groups: Mapping[str, Sequence[str]]) -> None:
        members = [name for names in groups.values() for name in names]
        repeated = sorted({name for name in members if members.count(name) > 1})
        if repeated:
            raise DataError(f"Classes in more than one group: {quote_names(repeated)}.")
        self._source = source
        self._groups = groups

    @property
    def name(self) -> str:  # type: ignore[override]
        """Names of the source and of the groups, joined by hyphens."""
        return "-".join([self._source.name, *self._groups])

    def _prepare(self) -> None:
        source = self._source
        label: dict[int, int] = {}
        for group_label, names in enumerate(self._groups.values()):
            for name in names:
                if name not in source.classes:
                    raise DataError(f"{source.name} has no class {name!r}. {did_you_mean(name, source.classes)}")
                label[source.classes.index(name)] = group_label
        self.classes = tuple(self._groups)
        self.splits = {
            split: [sample._replace(label=label[sample.label]) for sample in samples if sample.label in label]
            for split, samples in source.splits.items()
        }
        self.findings = (*source.findings, *class_findings(self.name, self.classes, self.splits))

    @property
    def decoder(self) -> type[Source]:
        """The decoder of the source, so that both have the same stored features."""
        return self._source.decoder

    def content(self, sample: Sample) -> bytes:
        """See :meth:`Source.content`."""
        return self._source.content(sample)

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """See :meth:`Source.decode`."""
        return self._source.decode(content, sample, min_size)

    def read(self, sample: Sample, min_size: int = 0) -> Image.Image:
        """See :meth:`Source.read`."""
        return self._source.read(sample, min_size)

    def stamp(self, sample: Sample) -> str | None:
        """See :meth:`Source.stamp`."""
        return self._source.stamp(sample)

    def digest(self, sample: Sample) -> bytes | None:
        """See :meth:`Source.digest`."""
        return self._source.digest(sample)

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """See :meth:`Source.prefetch`."""
        self._source.prefetch(samples)


regrouped = Relabeled  # the name in notebooks
