"""Base class of sources: labeled images, classes and splits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from PIL import Image

from project.errors import DataError, join_names

#: Accepted names of a split, in lower case, and the split that each means.
SPLITS = {
    **{"train": "train", "training": "train", "trainval": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


class Sample(NamedTuple):
    """One labeled image.

    Attributes:
        name: Path of the file, or another name that is unique in the source.
        label: Index into the classes of the source.
        group: Images of one group, such as those of one patient, are never divided between splits.
    """

    name: str
    label: int
    group: str = ""


class Finding(NamedTuple):
    """A result of checking the data.

    Attributes:
        level: ``refused``: training is impossible; ``problem``: results would be wrong; ``note``: for information.
        kind: Category, in a word or two.
        text: What is wrong, where, and how to fix it.
        names: The samples or files concerned.
    """

    level: Literal["refused", "problem", "note"]
    kind: str
    text: str
    names: tuple[str, ...] = ()


class Source(ABC):
    """Labelled images, optionally divided into splits.

    A constructor stores its arguments and does no I/O. :meth:`prepare` reads the folder, table or index, once;
    the first access to :attr:`classes`, :attr:`splits` or :attr:`findings` calls it. Data that cannot be trained on
    does not raise there: it is recorded in :attr:`findings`, so that ``check`` can report everything, and
    :meth:`require` raises.

    A subclass implements :meth:`_prepare`, which sets these three attributes, or sets them in its constructor.
    """

    #: Name of the data in run folders. It is known without reading the data.
    name: str
    #: Class names in the order of their indices.
    classes: tuple[str, ...]
    #: Samples by ``train``, ``val`` and ``test``; ``train`` alone if the data has no splits.
    splits: Mapping[str, list[Sample]]
    #: Findings that need no image to be read.
    findings: tuple[Finding, ...]
    _is_prepared = False

    def prepare(self) -> None:
        """Read the folder, table or index. Later calls have no effect.

        Raises:
            DataError: The data does not exist or cannot be read.
        """
        if not self._is_prepared:
            self._prepare()
            self._is_prepared = True

    def _prepare(self) -> None:  # noqa: B027 - not abstract: a constructor may set the attributes instead
        """Set :attr:`classes`, :attr:`splits` and, if there are any, :attr:`findings`."""

    if not TYPE_CHECKING:  # for a type checker, every attribute would exist

        def __getattr__(self, name: str) -> Any:
            """Prepare the source on the first access to an attribute that :meth:`_prepare` sets."""
            if name == "findings" and self._is_prepared:
                return ()
            if name not in ("classes", "splits", "findings") or self._is_prepared:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.prepare()
            return getattr(self, name)

    @property
    def decoder(self) -> type[Source]:
        """The class whose :meth:`decode` produces the images."""
        return type(self)

    @abstractmethod
    def content(self, sample: Sample) -> bytes:
        """Read the encoded bytes of a sample. Samples with equal bytes have equal images. Thread-safe.

        Raises:
            DataError: The sample is missing or cannot be read.
        """

    @abstractmethod
    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        """Decode a sample to an upright RGB image. Thread-safe.

        Args:
            content: Result of :meth:`content`.
            sample: The sample.
            min_size: Smallest shorter side to decode to, in pixels; 0 decodes at full size.

        Raises:
            DataError: The content is truncated, or not an image.
        """

    def stamp(self, sample: Sample) -> str | None:
        """A value that changes whenever :meth:`content` does, without reading it; ``None`` if not available."""
        return None

    def digest(self, sample: Sample) -> bytes | None:
        """SHA-256 of :meth:`content` if it is known without reading it, else ``None``."""
        return None

    def prefetch(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - most sources do not prefetch
        """Start to read the next samples in the background. A hint: sources with fast reads ignore it."""

    def read(self, sample: Sample, min_size: int = 0) -> Image.Image:
        """Read a sample as an RGB image: :meth:`content`, then :meth:`decode`."""
        return self.decode(self.content(sample), sample, min_size)

    def require(self) -> None:
        """Prepare the source, and raise if the data cannot be trained on.

        Raises:
            DataError: With the first finding of level ``refused`` and the number of further ones.
        """
        self.prepare()
        refused = [finding for finding in self.findings if finding.level == "refused"]
        if refused:
            more = f"\nand {len(refused) - 1} more: list all with python -m project check" if len(refused) > 1 else ""
            raise DataError(refused[0].text + more)


#: Old paths of decoders that have moved. They are part of the keys of stored features and of the image index.
MOVED_DECODERS = {
    "project.data.sources.digits.Digits.decode": "project.data.sources.Digits.decode",
    "project.data.sources.files.Encoded.decode": "project.data.sources.Encoded.decode",
}


def decoder_name(source: Source) -> str:
    """Name of the decoder of a source. Sources with the same decoder decode the same bytes to the same image."""
    decode = source.decoder.decode
    name = f"{decode.__module__}.{decode.__qualname__}"
    return MOVED_DECODERS.get(name, name)


def quote_names(names: Iterable[str], limit: int = 5) -> str:
    """Quote the first ``limit`` names and append the number of further ones, for a message."""
    return join_names(map(repr, names), limit)
