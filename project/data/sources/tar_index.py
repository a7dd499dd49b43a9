"""What is in a tar shard, and where: found in one pass over it as a stream, and kept."""

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

from project.data.sources.remote import fetch, located, reading, stamp
from project.errors import DataError
from project.runtime.atomic_write import replacing

VERSION = 1  # of what is kept
#: Of an image: where its bytes are in the tar file, which of the labels it has, and the SHA-256 of its bytes.
ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<u4"), ("digest", "V32")])
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

META = re.compile(r"__[^/]*__($|/)")  # members with which webdataset notes something on the shard
#: A member's key and extensions: everything up to the first dot of its file name, and what follows. As webdataset.
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")

Image = tuple[str, int, int, bytes]
"""Name of the member, offset, size, digest."""


class Member(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: Its name.
        key: Its name up to the extensions: the same for all members of a sample.
        suffix: Its extensions, in lower case.
        content: An :data:`Image`, the bytes of a label, or ``None`` for other members.
    """

    name: str
    key: str
    suffix: str
    content: Any


@dataclass(frozen=True)
class ShardContents:
    """What is in a shard.

    Attributes:
        rows: One an image, in order, of :data:`ROW`.
        names: Of the members that the images are.
        labels: Each once, as it is written; rows have indices of them.
        bad: Samples that are left out: by what is wrong with them, their keys.
    """

    rows: np.ndarray
    names: list[str]
    labels: list[str]
    bad: Mapping[str, list[str]]

    def pack(self, mark: str) -> bytes:
        """As bytes that know whether they are whole, and which state of the shard they are of."""
        head = {"mark": mark, "names": self.names, "labels": self.labels, "bad": self.bad}
        body = json.dumps(head).encode() + b"\n" + self.rows.tobytes()
        return hashlib.sha256(body).digest() + body

    @classmethod
    def unpack(cls, packed: bytes, mark: str) -> ShardContents | None:
        """The reverse; ``None`` if they are damaged, or of another state of the shard."""
        digest, body = packed[:32], packed[32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        head, _, rows = body.partition(b"\n")
        told = json.loads(head)
        if told.pop("mark") != mark:
            return None
        return cls(np.frombuffer(rows, ROW), **told)


@dataclass(frozen=True)
class ShardIndexer:
    """Finds what is in shards.

    Attributes:
        image: Extensions of the member of a sample that is the image; the first that it has is taken.
        label: Extension of the member that is the label.
        folder: Where it is kept what has been found.
    """

    image: tuple[str, ...]
    label: str
    folder: Path

    def kept(self, url: str) -> ShardContents | None:
        """What is known of a shard as it is now; nothing of one that cannot be had, as reading it will tell."""
        try:
            mark = stamp(url)
            if mark is None:  # it may have changed
                return None
            return ShardContents.unpack(self._file(url).read_bytes(), self._mark(mark))
        except (DataError, OSError):  # OSError: mostly none is kept yet; another reason comes back when one is written
            return None

    def read(self, url: str) -> tuple[ShardContents, OSError | None]:
        """Read a shard once, as a stream, and keep what is found.

        Returns:
            What is in it; and why that cannot be kept, if so.

        Raises:
            DataError: There is no such shard, or it is damaged, cut off or compressed.
        """
        mark = stamp(url)
        with reading(url):
            found = self._scan(url)
        if mark is None:
            return found, None
        if stamp(url) != mark:
            raise DataError(f"data.source: {url} was changed while it was read. Run again when it is written.")
        try:
            with replacing(self._file(url)) as temporary:
                temporary.write_bytes(found.pack(self._mark(mark)))
        except OSError as error:
            return found, error
        return found, None

    def _file(self, url: str) -> Path:
        files, path = located(url)
        text = f"{url.rpartition('::')[0]} {files.unstrip_protocol(path)} {self.image} {self.label}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.index"

    def _mark(self, mark: str) -> str:
        return f"{VERSION} {mark}"

    def _scan(self, url: str) -> ShardContents:
        bad: dict[str, list[str]] = defaultdict(list)
        images: list[Image] = []
        codes: list[int] = []
        labels: dict[str, int] = {}
        seen: set[str] = set()
        for key, members in itertools.groupby(self._members(url), key=operator.attrgetter("key")):
            sample: dict[str, Any] = {}
            for member in members:
                if member.suffix in sample:
                    bad["has a member twice, of which the first is taken"].append(member.name)
                sample.setdefault(member.suffix, member.content)
            image = next((sample[name] for name in self.image if name in sample), None)
            label = self._label(sample.get(self.label))
            if key in seen:
                bad["has the key of another before it"].append(key)
            elif image is None:
                bad[f"has no image: no member {' or '.join('.' + name for name in self.image)}"].append(key)
            elif label is None:
                what = "no label" if self.label in sample else f"no label: no member .{self.label}"
                bad[f"has {what}"].append(key)
            else:
                images.append(image)
                codes.append(labels.setdefault(label, len(labels)))
            seen.add(key)
        rows = np.zeros(len(images), ROW)
        for at, (_, offset, size, digest) in enumerate(images):
            rows[at] = offset, size, codes[at], digest
        return ShardContents(rows, [image[0] for image in images], list(labels), dict(bad))

    def _label(self, content: bytes | None) -> str | None:
        """A label as it is written: a class's number, or its name."""
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
        """Members of a tar file that belong to a sample, in order."""
        files, path = located(url)
        last = "its beginning"
        try:
            with files.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would hold all of them
                    last = member.name
                    parts = MEMBER.fullmatch(member.name)
                    if parts is None or META.match(member.name) or not member.isreg() or member.issparse():
                        continue
                    suffix = parts[2].lower()
                    content: Any = None
                    if suffix in self.image:
                        digest = hashlib.file_digest(_opened(tar, member), "sha256").digest()  # a block at a time
                        content = member.name, member.offset_data, member.size, digest
                    elif suffix == self.label:
                        content = _opened(tar, member).read()
                    yield Member(member.name, parts[1], suffix, content)
                end = tar.offset
        except tarfile.TarError as error:
            packing = self._packing(fetch(url, 0, 8))
            if packing:
                raise DataError(
                    f"data.source: {url} is compressed ({packing}), so that no image can be read by its place in it. "
                    "Unpack it to a plain .tar: images are compressed already."
                ) from error
            raise DataError(
                f"data.source: {url} is damaged or cut off after {last}: {error}. Fetch it anew."
            ) from error
        # Damage behind the first member, and a file that was cut between two, look like the end to tarfile.
        if fetch(url, end, end + tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"data.source: {url} is damaged or cut off after {last}: there is no end. Fetch it anew.")

    @staticmethod
    def _packing(beginning: bytes) -> str | None:
        return next((name for magic, name in PACKED.items() if beginning.startswith(magic)), None)


def _opened(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    """A regular member, which has content, for reading."""
    return tar.extractfile(member)
