"""Uploads: read the bytes of an image from a request, and check its header before it is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from project.data.image_io import open_image
from project.inference.serving.limits import MAX_SCANS, MAX_SCANS_OF_LARGEST, RefusedError, RequestLimits

FORM = "multipart/form-data"
RAW = ("image/", "application/octet-stream")
#: Formats that are decoded. Others can contain an image of another format, whose size their header does not state, such
#: as ICNS.
FORMATS = frozenset(("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA"))
#: First bytes of an ICO file, which is such a format, and which Pillow decodes when it opens it.
ICO = b"\0\0\1\0"
MARGIN = 4096  # bytes of a form besides its file
START_OF_SCAN = b"\xff\xda"  # JPEG marker; in compressed data, each 0xff is followed by another byte
#: Status for a client that has closed its connection, which no client receives.
CLIENT_CLOSED = 499


class _Form(MultiPartParser):
    """Keeps files in memory: their size is limited, and an upload is never written to disk."""

    spool_max_size = 2**62


async def read_upload(request: Request, limits: RequestLimits) -> bytes:
    """Read the bytes of an image.

    Args:
        request: A form with one file, or the file as the body.
        limits: Of size and time.

    Raises:
        RefusedError: The request is too large, too slow, or contains no image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM and kind and not kind.startswith(RAW):
        raise RefusedError(
            415,
            f"Content-Type {kind} is not supported; send {FORM} with one file, or the bytes of an image as image/*.",
        )
    max_bytes = limits.max_bytes + (MARGIN if kind == FORM else 0)
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.max_seconds):
            if kind == FORM:
                content = await _read_form(request, max_bytes, limits)
            else:
                content = b"".join([chunk async for chunk in _limited(request, max_bytes, limits)])
    except TimeoutError as error:
        reason = f"The upload takes more than {limits.max_seconds:g} seconds."
        raise RefusedError(408, reason, {"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise RefusedError(CLIENT_CLOSED, "The client has closed the connection.") from error
    if not content:
        raise RefusedError(400, "The image is empty: it has 0 bytes.")
    if len(content) > limits.max_bytes:
        raise _too_large(limits)
    return content


async def _read_form(request: Request, max_bytes: int, limits: RequestLimits) -> bytes:
    try:
        form = await _Form(request.headers, _limited(request, max_bytes, limits), max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise RefusedError(400, f"The form cannot be read: {error.message}") from error
    try:
        values = [value for _, value in form.multi_items()]
        if len(values) != 1 or not isinstance(values[0], UploadFile):
            raise RefusedError(
                400, "The form must contain one file and no other field, as in: curl -F image=@photo.jpg"
            )
        return await values[0].read()
    finally:
        await form.close()


async def _limited(request: Request, max_bytes: int, limits: RequestLimits) -> AsyncGenerator[bytes]:
    """The chunks of a body, whose size need not be stated."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(limits)
        yield chunk


def _too_large(limits: RequestLimits) -> RefusedError:
    return RefusedError(413, f"The upload has more than {limits.max_megabytes:g} MB.")


def _unaccepted(kind: str | None) -> RefusedError:
    return RefusedError(422, f"Images of the format {kind} are not accepted; send a JPEG or PNG.")


def check_header(content: bytes, limits: RequestLimits) -> None:
    """Check format, number of pixels, and number of scans of an image, as its file states them. Nothing is decoded.

    Args:
        content: The bytes of a file.
        limits: Of pixels.

    Raises:
        RefusedError: The content is not an image, or it is too large.
    """
    if content.startswith(ICO):
        raise _unaccepted("ICO")
    try:
        with open_image(content) as image:
            (width, height), kind = image.size, image.format
    except UnidentifiedImageError as error:
        raise RefusedError(422, "The image is not a readable image.") from error
    except Image.DecompressionBombError as error:
        raise RefusedError(413, f"The image has more than {limits.max_megapixels:g} megapixels.") from error
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise RefusedError(422, f"The image cannot be read: {str(error) or type(error).__name__}.") from error
    if kind not in FORMATS:
        raise _unaccepted(kind)
    pixels, max_pixels = width * height, limits.max_megapixels * 1e6
    if pixels > max_pixels:
        raise RefusedError(
            413, f"The image has {width} x {height} pixels, more than {limits.max_megapixels:g} megapixels."
        )
    scans = content.count(START_OF_SCAN) if kind in ("JPEG", "MPO") else 0
    if scans > MAX_SCANS or scans * pixels > MAX_SCANS_OF_LARGEST * max_pixels:
        raise RefusedError(413, f"The JPEG has {scans} scans, too many for {width} x {height} pixels.")
