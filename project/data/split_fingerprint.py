"""One SHA-256 for all images of a split and their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from project.data.sources.base import Sample


def split_fingerprint(samples: Sequence[Sample], digests: Sequence[bytes], classes: Sequence[str]) -> str:
    """SHA-256 of the images' digests and the names of their classes.

    Neither the images' names nor their order counts: data that was moved or renamed has the same one.

    Args:
        samples: N samples.
        digests: SHA-256 of the bytes of each.
        classes: Names of the classes.

    Returns:
        64 hexadecimal digits.
    """
    names = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in classes]
    whole = hashlib.sha256()
    for pair in sorted(digest + names[sample.label] for sample, digest in zip(samples, digests, strict=True)):
        whole.update(pair)
    return whole.hexdigest()
