"""One SHA-256 for all images of a split and their labels, and what two splits have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from project.data.sources.base import Sample


def split_fingerprint(samples: Sequence[Sample], digests: np.ndarray, classes: Sequence[str]) -> str:
    """SHA-256 of the images' digests and the names of their classes.

    Neither the images' names nor their order counts: data that was moved or renamed has the same one.

    Args:
        samples: N samples.
        digests: SHA-256 of the bytes of each, uint8 ``(N, 32)``.
        classes: Names of the classes.

    Returns:
        64 hexadecimal digits.
    """
    names = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in classes]
    rank = np.argsort(np.argsort(np.array(names, "S32"))) if names else np.empty(0, np.int64)
    # numpy compares strings of one length as bytes; those that end in zeros are compared as if they had none, which
    # comes to the same.
    content = np.ascontiguousarray(digests).view("S32").ravel()
    labels = np.fromiter((sample.label for sample in samples), np.int32, len(samples))
    order = np.lexsort((rank[labels], content))
    whole = hashlib.sha256()
    for at in order.tolist():
        whole.update(digests[at].tobytes() + names[labels[at]])
    return whole.hexdigest()


def count_common(digests: np.ndarray, others: np.ndarray) -> int:
    """How many different images are in both of two splits.

    Args:
        digests: SHA-256 of the bytes of each image, uint8 ``(N, 32)``.
        others: The same of the other split, uint8 ``(M, 32)``.
    """
    one, other = (np.ascontiguousarray(each).view("S32").ravel() for each in (digests, others))
    order = np.argsort(one)
    wanted = np.unique(other)
    at = np.searchsorted(one, wanted, sorter=order)
    inside = at < len(one)
    return int((one[order[at[inside]]] == wanted[inside]).sum())
