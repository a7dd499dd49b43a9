"""Labelled images: what every source of them gives, classes and samples in splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from PIL import Image

from project.errors import DataError

#: Names that people give to a split.
SPLITS = {
    **{"train": "train", "training": "train", "trainval": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


class Sample(NamedTuple):
    """One labelled image.

    Attributes:
        name: The file's path, or another name that tells it from all others.
        label: Index into the source's classes.
        group: Images of one group, such as those of one patient, are never put on two sides of a split.
    """

    name: str
    label: int
    group: str = ""


class Finding(NamedTuple):
    """Something that is to be known of a source's data.

    Attributes:
        level: ``refused``: nothing can be trained on it; ``problem``: it would spoil a result; ``note``: good to know.
        kind: What sort of thing, in a word or two.
        text: What, where, and how to mend it.
        names: The samples or files that it is about.
    """

    level: Literal["refused", "problem", "note"]
    kind: str
    text: str
    names: tuple[str, ...] = ()


class Source(ABC):
    """Labelled images, some of them already in splits.

    A source is made even of data that nothing can be trained on: what is wrong is in :attr:`findings`, so that all of
    it can be told in one go, and :meth:`require` refuses it.
    """

    name: str
    classes: tuple[str, ...]
    #: By ``train``, ``val`` and ``test``; a source without splits of its own has ``train`` alone.
    splits: Mapping[str, list[Sample]]
    #: What is to be known of the data before any image is read.
    findings: tuple[Finding, ...] = ()

    @abstractmethod
    def content(self, sample: Sample) -> bytes:
        """The bytes that a sample's image is made from: two samples with the same bytes have the same image.

        Like :meth:`decode`, it is called from several threads at once.
        """

    @abstractmethod
    def decode(self, content: bytes, sample: Sample, enough: int = 0) -> Image.Image:
        """Make the image, in RGB, of a sample from its bytes.

        Args:
            content: The bytes.
            sample: Whose they are.
            enough: Pixels that the shorter side needs, if fewer than it has will do; 0 for all.
        """

    def stamp(self, sample: Sample) -> str | None:
        """What changes whenever :meth:`content` does, told without reading it; ``None`` where nothing does."""
        return None

    def digest(self, sample: Sample) -> bytes | None:
        """SHA-256 of :meth:`content`, where it is known without reading it."""
        return None

    def expect(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - most sources have nothing to do
        """Be told which samples are read next, for a source whose reads are better under way all at once."""

    def read(self, sample: Sample, enough: int = 0) -> Image.Image:
        """Read the image of a sample, in RGB: :meth:`content`, then :meth:`decode`."""
        return self.decode(self.content(sample), sample, enough)

    def require(self) -> None:
        """Refuse data that nothing can be trained on.

        Raises:
            DataError: With the first such finding, and how many more there are.
        """
        refused = [finding for finding in self.findings if finding.level == "refused"]
        if refused:
            more = f"\nand {len(refused) - 1} more: see all with python -m project check" if len(refused) > 1 else ""
            raise DataError(refused[0].text + more)


#: Decoders that have moved, by where they are: the names that keys of rows and the index of images have for them.
MOVED_DECODERS = {
    "project.data.sources.digits.Digits.decode": "project.data.sources.Digits.decode",
    "project.data.sources.files.Encoded.decode": "project.data.sources.Encoded.decode",
}


def decoder_name(source: Source) -> str:
    """What tells the decoder of a source from others that make other images of the same bytes."""
    decode = type(source).decode
    name = f"{decode.__module__}.{decode.__qualname__}"
    return MOVED_DECODERS.get(name, name)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, quoted, and how many more there are."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
