"""Images that are encoded as files: what sources of such images share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from project.data.image_io import decode_image, read_bytes, stamp
from project.data.sources.base import Finding, Sample, Source
from project.data.sources.findings import class_findings, name_findings


class Encoded(Source):
    """Images whose content is that of an image file, wherever it comes from."""

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """Decode a file, upright and in RGB; a :class:`~project.errors.DataError` names one that cannot be."""
        return decode_image(content, sample.name, min_size)


class Files(Encoded):
    """Images that are files; a sample's name is the path of its own."""

    def content(self, sample: Sample) -> bytes:
        """Read a file; a :class:`~project.errors.DataError` names one that cannot be read."""
        return read_bytes(sample.name)

    def stamp(self, sample: Sample) -> str | None:
        """Size, time of the last change, and inode of the file."""
        return stamp(sample.name)


class PublishedDataset(Encoded):
    """Labelled images of a set that others have made."""

    def _take(
        self,
        rows: Mapping[str, Sequence[tuple[str, Any]]],
        word: Callable[[Any], str],
        findings: Sequence[Finding] = (),
    ) -> None:
        """Take names and labels by split, ``None`` for no label. Classes are the labels that occur, in their order."""
        labels = sorted({label for found in rows.values() for _, label in found if label is not None})
        words = [word(label) for label in labels]
        often = Counter(words)  # ImageNet has two kinds of crane, and two of maillot
        self.classes = tuple(w if often[w] == 1 else f"{w} ({label})" for w, label in zip(words, labels, strict=True))
        index = {label: number for number, label in enumerate(labels)}
        splits = {
            split: [Sample(name, index[label]) for name, label in found if label is not None]
            for split, found in rows.items()
        }
        bare = {split: len(found) - len(splits[split]) for split, found in rows.items()}
        self.splits = {split: samples for split, samples in splits.items() if samples or split == "train"}
        unlabelled = [
            Finding("note", "no label", f"{count} images of {split} have no label, and are left out.")
            for split, count in bare.items()
            if count
        ]
        listed = class_findings(f"data.source: {self.name}", self.classes, self.splits)
        self.findings = (*findings, *unlabelled, *listed, *name_findings(self.classes, published=True))
