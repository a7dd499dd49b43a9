"""Base classes of sources whose images are encoded as image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from project.data.image_io import decode_image, read_bytes, stamp
from project.data.sources.base import Finding, Sample, Source
from project.data.sources.findings import class_findings, name_findings


class Encoded(Source):
    """Images whose content is the bytes of an image file, from any storage."""

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """See :func:`~project.data.image_io.decode_image`."""
        return decode_image(content, sample.name, min_size)


class Files(Encoded):
    """Image files on disk. The name of a sample is its path."""

    def content(self, sample: Sample) -> bytes:
        """Read the file."""
        return read_bytes(sample.name)

    def stamp(self, sample: Sample) -> str | None:
        """See :func:`~project.data.image_io.stamp`."""
        return stamp(sample.name)


class PublishedDataset(Encoded):
    """Base class of sources that read published data sets."""

    def _set_samples(
        self,
        rows: Mapping[str, Sequence[tuple[str, Any]]],
        class_name: Callable[[Any], str],
        findings: Sequence[Finding] = (),
    ) -> None:
        """Set classes, splits and findings from the name and label of each image by split.

        Images with label ``None`` are skipped. The classes are the labels that occur, sorted; equal names get the
        label as a suffix.
        """
        labels = sorted({label for split_rows in rows.values() for _, label in split_rows if label is not None})
        names = [class_name(label) for label in labels]
        occurrences = Counter(names)  # ImageNet has two classes "crane", and two "maillot"
        self.classes = tuple(
            name if occurrences[name] == 1 else f"{name} ({label})" for name, label in zip(names, labels, strict=True)
        )
        index = {label: number for number, label in enumerate(labels)}
        samples = {
            split: [Sample(name, index[label]) for name, label in split_rows if label is not None]
            for split, split_rows in rows.items()
        }
        self.splits = {split: members for split, members in samples.items() if members or split == "train"}
        unlabeled = [
            Finding("note", "no label", f"{count} images of {split} have no label and are skipped.")
            for split in rows
            if (count := len(rows[split]) - len(samples[split]))
        ]
        self.findings = (
            *findings,
            *unlabeled,
            *class_findings(f"data.source: {self.name}", self.classes, self.splits),
            *name_findings(self.classes, published=True),
        )
