"""An HTTP client that keeps a server busy, and hostile uploads.

It speaks HTTP/1.1 on asyncio's streams, because a general client takes more CPU time than the server.
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from PIL import Image

BOUNDARY = "frontier"


@dataclass
class Load:
    """Result of a load test.

    Attributes:
        seconds: Latency of each answered request.
        statuses: Number of responses by status.
        wall: Duration of the test in seconds.
        cpu: CPU time of the client in seconds.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wall: float = 0.0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.statuses[200] / self.wall

    def percentile(self, percent: float) -> float:
        """Percentile of the latency in milliseconds."""
        return 1000 * sorted(self.seconds)[int(percent / 100 * (len(self.seconds) - 1))]


def form(content: bytes, name: str = "photo.jpg") -> bytes:
    """A request with a form that contains a file."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return _head(f"multipart/form-data; boundary={BOUNDARY}", len(body)) + body


def raw(content: bytes) -> bytes:
    """A request whose body is a file."""
    return _head("application/octet-stream", len(content)) + content


def _head(kind: str, length: int) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {kind}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """Send a request and read status and body of its response."""
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
    return int(head.split()[1]), await reader.readexactly(length)


async def once(port: int, request: bytes) -> tuple[int, Any]:
    """Status and JSON of a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        status, body = await exchange(reader, writer, request)
        return status, json.loads(body)
    finally:
        writer.close()


async def saturate(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Keep so many requests in progress for so many seconds."""
    load, source, start, cpu = Load(), cycle(requests), time.perf_counter(), time.process_time()

    async def connection(requests: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            status, _ = await exchange(reader, writer, next(requests))
            load.statuses[status] += 1
            if status == 200:
                load.seconds.append(time.perf_counter() - began)
            else:
                await asyncio.sleep(0.1)
        writer.close()

    await asyncio.gather(*(connection(source) for _ in range(connections)))
    load.wall, load.cpu = time.perf_counter() - start, time.process_time() - cpu
    return load


def png(width: int, height: int) -> bytes:
    """A small PNG that states so many pixels, all of them black: a decompression bomb."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    compress = zlib.compressobj(9)
    rows = b"".join(compress.compress(b"\0" * (1 + width)) for _ in range(height)) + compress.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def many_scans(photograph: bytes, scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    output = io.BytesIO()
    Image.open(io.BytesIO(photograph)).save(output, "JPEG", progressive=True)
    content = output.getvalue()
    begin = content.rindex(b"\xff\xda")
    return content[:-2] + content[begin:-2] * scans + content[-2:]


def hostile(photograph: bytes) -> dict[str, bytes]:
    """Requests that a server must refuse, by name.

    Args:
        photograph: A JPEG.
    """
    url = b'{"url": "http://127.0.0.1/photo.jpg"}'
    return {
        "bomb (30,000 x 30,000 px)": form(png(30_000, 30_000)),
        "bomb (9,000 x 9,000 px)": form(png(9_000, 9_000)),
        "JPEG of 2,000 scans": raw(many_scans(photograph, 2000)),
        "text": form(b"no image\n" * 1000),
        "truncated": raw(photograph[: len(photograph) // 2]),
        "100 MB": raw(photograph + bytes(100_000_000)),
        "100 MB form": form(bytes(100_000_000)),
        "URL": _head("application/json", len(url)) + url,
        "empty": raw(b""),
    }
