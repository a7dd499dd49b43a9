"""Labelled images: what every source of them gives, classes and samples in splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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

    A constructor takes arguments and reads nothing. :meth:`prepare` reads the folder, table or index, once;
    :attr:`classes`, :attr:`splits` and :attr:`findings` call it when they are read before it. Data that cannot be
    trained on does not fail there: what is wrong is in :attr:`findings`, so that ``check`` reports all of it, and
    :meth:`require` refuses it.

    A subclass defines :meth:`_prepare`, which sets the three attributes; or sets them in its constructor.
    """

    #: Names the data in folders of runs. Cheap: it reads no image, table or index.
    name: str
    #: Names of the classes, in the order of their indices.
    classes: tuple[str, ...]
    #: By ``train``, ``val`` and ``test``; a source without splits of its own has ``train`` alone.
    splits: Mapping[str, list[Sample]]
    #: What is known of the data before any image is read.
    findings: tuple[Finding, ...]
    _is_prepared = False

    def prepare(self) -> None:
        """Read the folder, table or index. Later calls return at once.

        Raises:
            DataError: It does not exist, or cannot be read.
        """
        if not self._is_prepared:
            self._prepare()
            self._is_prepared = True

    def _prepare(self) -> None:  # noqa: B027 - a source may set its attributes in its constructor
        """Set :attr:`classes`, :attr:`splits` and, if there are any, :attr:`findings`."""

    if not TYPE_CHECKING:  # where it would give every name a type

        def __getattr__(self, name: str) -> Any:
            """Prepare, for an attribute that is not set yet."""
            if name == "findings" and self._is_prepared:
                return ()
            if name not in ("classes", "splits", "findings") or self._is_prepared:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.prepare()
            return getattr(self, name)

    @property
    def decoder(self) -> type[Source]:
        """The class whose :meth:`decode` and :meth:`read` make the images."""
        return type(self)

    @abstractmethod
    def content(self, sample: Sample) -> bytes:
        """The bytes that a sample's image is made from: two samples with the same bytes have the same image.

        Like :meth:`decode`, it is called from several threads at once.
        """

    @abstractmethod
    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """Make the image, in RGB, of a sample from its bytes.

        Args:
            content: The bytes.
            sample: Whose they are.
            min_size: Pixels that the shorter side needs, if fewer than it has will do; 0 for all.
        """

    def stamp(self, sample: Sample) -> str | None:
        """What changes whenever :meth:`content` does, told without reading it; ``None`` where nothing does."""
        return None

    def digest(self, sample: Sample) -> bytes | None:
        """SHA-256 of :meth:`content`, where it is known without reading it."""
        return None

    def prefetch(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - most sources have nothing to do
        """Be told which samples are read next, for a source whose reads are better under way all at once."""

    def read(self, sample: Sample, min_size: int = 0) -> Image.Image:
        """Read the image of a sample, in RGB: :meth:`content`, then :meth:`decode`."""
        return self.decode(self.content(sample), sample, min_size)

    def require(self) -> None:
        """Prepare, and refuse data that nothing can be trained on.

        Raises:
            DataError: With the first such finding, and how many more there are.
        """
        self.prepare()
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
    decode = source.decoder.decode
    name = f"{decode.__module__}.{decode.__qualname__}"
    return MOVED_DECODERS.get(name, name)


def quote_names(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, quoted, and how many more there are."""
    listed = [repr(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
