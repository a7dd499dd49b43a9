"""Index of tar shards: name, position, label and digest of each image, built in one pass and cached on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from project.data.sources.remote import convert_errors, fetch, open_filesystem, stamp
from project.errors import DataError
from project.runtime.atomic_write import atomic_write

VERSION = 1  # of the index files
#: An image: position of its bytes in the tar file, index into the labels of the shard, and SHA-256 of its bytes.
ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<u4"), ("digest", "V32")])
NO_LABEL = "image"
#: First bytes of compressed files.
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

METADATA = re.compile(r"__[^/]*__($|/)")  # members with metadata of the shard, as webdataset writes them
#: Key and extensions of a member, divided at the first dot of its file name, as webdataset does.
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


class ImageMember(NamedTuple):
    """An image in a tar file: name of its member, position of its bytes, and their SHA-256."""

    name: str
    offset: int
    size: int
    digest: bytes


class Member(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: Full name.
        key: Name without the extensions; equal for all members of a sample.
        suffix: Extensions in lower case.
        content: An :class:`ImageMember`, the bytes of a label, or ``None`` for other members.
    """

    name: str
    key: str
    suffix: str
    content: Any


@dataclass(frozen=True)
class ShardContents:
    """Index of a shard.

    Attributes:
        rows: The images in order, of dtype :data:`ROW`.
        names: Member names of the images.
        labels: Distinct labels, as text.
        bad: Keys of bad samples, by the reason.
    """

    rows: np.ndarray
    names: list[str]
    labels: list[str]
    bad: Mapping[str, list[str]]

    def to_bytes(self, mark: str) -> bytes:
        """Serialize with a checksum and ``mark``, which identifies the indexed state of the shard."""
        header = {"mark": mark, "names": self.names, "labels": self.labels, "bad": self.bad}
        body = json.dumps(header).encode() + b"\n" + self.rows.tobytes()
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, content: bytes, mark: str) -> ShardContents | None:
        """Deserialize; ``None`` if the content is damaged, or of another state of the shard."""
        digest, body = content[:32], content[32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        header_bytes, _, rows = body.partition(b"\n")
        header = json.loads(header_bytes)
        if header.pop("mark") != mark:
            return None
        return cls(np.frombuffer(rows, ROW), **header)


@dataclass(frozen=True)
class ShardIndexer:
    """Builds and caches the indices of shards.

    Attributes:
        image: Extensions of the image; the first that a sample has is used.
        label: Extension of the label; empty for images without labels, whose label is :data:`NO_LABEL`.
        folder: Folder of the index files.
    """

    image: tuple[str, ...]
    label: str
    folder: Path

    def load(self, url: str) -> ShardContents | None:
        """Load the cached index of a shard; ``None`` if it is missing, damaged or out of date."""
        try:
            state = stamp(url)
            if state is None:  # changes of the shard cannot be detected
                return None
            return ShardContents.from_bytes(self._index_file(url).read_bytes(), self._mark(state))
        except (DataError, OSError):  # building the index reports an error of the shard, or of the index file
            return None

    def build(self, url: str) -> tuple[ShardContents, OSError | None]:
        """Index a shard by reading it once as a stream, and cache the index.

        Returns:
            The index, and the error if it cannot be cached.

        Raises:
            DataError: The shard does not exist, or is damaged, truncated or compressed.
        """
        state = stamp(url)
        with convert_errors(url):
            contents = self._scan(url)
        if state is None:
            return contents, None
        if stamp(url) != state:
            raise DataError(f"data.source: {url} changed while it was read. Run again when it is complete.")
        try:
            with atomic_write(self._index_file(url)) as temporary:
                temporary.write_bytes(contents.to_bytes(self._mark(state)))
        except OSError as error:
            return contents, error
        return contents, None

    def _index_file(self, url: str) -> Path:
        files, path = open_filesystem(url)
        key = f"{url.rpartition('::')[0]} {files.unstrip_protocol(path)} {self.image} {self.label}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.index"

    @staticmethod
    def _mark(state: str) -> str:
        return f"{VERSION} {state}"

    def _scan(self, url: str) -> ShardContents:
        bad: dict[str, list[str]] = defaultdict(list)
        images: list[ImageMember] = []
        codes: list[int] = []
        labels: dict[str, int] = {}
        seen: set[str] = set()
        for key, members in itertools.groupby(self._members(url), key=operator.attrgetter("key")):
            sample: dict[str, Any] = {}
            for member in members:
                if member.suffix in sample:
                    bad["has a repeated member, of which the first is used"].append(member.name)
                sample.setdefault(member.suffix, member.content)
            image = next((sample[suffix] for suffix in self.image if suffix in sample), None)
            label = self._parse_label(sample.get(self.label)) if self.label else NO_LABEL
            if key in seen:
                bad["has the key of an earlier sample"].append(key)
            elif image is None:
                bad[f"has no image: no member {' or '.join('.' + suffix for suffix in self.image)}"].append(key)
            elif self.label and self.label not in sample:
                bad[f"has no label: no member .{self.label}"].append(key)
            elif label is None:
                bad["has an empty or invalid label"].append(key)
            else:
                images.append(image)
                codes.append(labels.setdefault(label, len(labels)))
            seen.add(key)
        rows = np.zeros(len(images), ROW)
        for index, (image, code) in enumerate(zip(images, codes, strict=True)):
            rows[index] = image.offset, image.size, code, image.digest
        return ShardContents(rows, [image.name for image in images], list(labels), dict(bad))

    def _parse_label(self, content: bytes | None) -> str | None:
        """Number or name of a class; ``None`` if the label is missing or invalid."""
        if content is None:
            return None
        try:
            text = content.decode("utf-8-sig")
            value = json.loads(text) if self.label.endswith("json") else text.strip()
        except ValueError:
            return None
        if isinstance(value, dict):
            value = value.get("label")
        return str(value).strip() or None if isinstance(value, str | int) and not isinstance(value, bool) else None

    def _members(self, url: str) -> Iterator[Member]:
        """Members of a tar file that belong to samples, in order."""
        files, path = open_filesystem(url)
        last = "its beginning"
        try:
            with files.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                    last = member.name
                    parts = MEMBER.fullmatch(member.name)
                    if parts is None or METADATA.match(member.name) or not member.isreg() or member.issparse():
                        continue
                    suffix = parts[2].lower()
                    opened: Any = tar.extractfile(member)  # never None for a regular member
                    content: Any = None
                    if suffix in self.image:
                        digest = hashlib.file_digest(opened, "sha256").digest()  # reads in blocks
                        content = ImageMember(member.name, member.offset_data, member.size, digest)
                    elif suffix == self.label:
                        content = opened.read()
                    yield Member(member.name, parts[1], suffix, content)
                end = tar.offset
        except tarfile.TarError as error:
            beginning = fetch(url, 0, 8)
            compression = next((name for magic, name in MAGIC.items() if beginning.startswith(magic)), None)
            if compression:
                raise DataError(
                    f"data.source: {url} is compressed ({compression}), which prevents random access to its images. "
                    "Unpack it to a plain .tar: images are compressed already."
                ) from error
            raise DataError(
                f"data.source: {url} is damaged or truncated after {last}: {error}. Download it again."
            ) from error
        # tarfile treats damage after the first member, and truncation between two members, as the end of the file.
        if fetch(url, end, end + tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"data.source: {url} is damaged or truncated after {last}: it has no end marker. Download it again."
            )
