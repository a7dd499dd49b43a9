"""Limits of a request, and the refusal of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from project.errors import ConfigError

#: Largest number of scans of a JPEG, and of an image with as many pixels as are permitted. Progressive files have about
#: ten. Each scan is decoded at the full number of pixels, so a small file with thousands of scans would take hours.
MAX_SCANS = 100
MAX_SCANS_OF_LARGEST = 20
#: Pillow opens no larger image.
MAX_MEGAPIXELS = 178.0
#: Seconds after which a client may try again.
RETRY_AFTER = "1"


@dataclass(frozen=True)
class RequestLimits:
    """What the server accepts.

    Attributes:
        max_megabytes: Largest upload.
        max_megapixels: Largest image, by the size that its file states.
        max_seconds: Longest time of the headers of a request, of an upload, and from there to its answer.
        max_requests: Largest number of requests in progress; further ones are refused until one is answered.
    """

    max_megabytes: float = 20.0
    max_megapixels: float = 50.0
    max_seconds: float = 30.0
    max_requests: int = 64

    def validate(self) -> None:
        """Check that all limits are positive, and that Pillow opens the largest image.

        Raises:
            ConfigError: One is out of range.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{item.name} must be more than 0, not {value}.")
        if self.max_megapixels > MAX_MEGAPIXELS:
            raise ConfigError(f"--max_megapixels must be at most {MAX_MEGAPIXELS:g}: Pillow opens no larger image.")

    @property
    def max_bytes(self) -> int:
        """Largest upload in bytes."""
        return int(self.max_megabytes * 1e6)


@dataclass
class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        reason: One sentence for the client.
        headers: Headers of the response.
    """

    status: int
    reason: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


def unavailable(reason: str) -> RefusedError:
    """A refusal after which the client may try again."""
    return RefusedError(503, reason, {"Retry-After": RETRY_AFTER})
