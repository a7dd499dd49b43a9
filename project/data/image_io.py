"""Image files: list a folder, read bytes, decode to upright RGB."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from project.errors import DataError

#: Suffixes of HEIC files, the format of iPhones; supported if ``pillow-heif`` is installed.
HEIC = (".heic", ".heif")
READS_HEIC = importlib.util.find_spec("pillow_heif") is not None
SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".ico"),
        *(HEIC if READS_HEIC else ()),
    )
)

#: Part of the key of stored features. Increase it when any image is decoded or resized to other pixels than before.
DECODING = 4
ORIENTATION = 0x0112  # EXIF tag
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # TIFF tags
#: Bit depths of cameras that store their pixels in 16-bit files.
CAMERA_DEPTHS = (10, 12, 14)


@dataclass
class Listing:
    """Contents of a folder.

    Attributes:
        images: Files with the suffix of a readable image format, sorted by path.
        hidden: Skipped files and folders whose names begin with a dot.
        others: Skipped files with any other suffix.
        loops: Links to a folder that contains them.
        closed: Folders that cannot be listed, and broken links.
    """

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """List a folder and its subfolders.

    Links to folders are followed, each real folder once. A broken link with an image suffix is
    listed; reading it fails.

    Args:
        folder: The top folder.
    """
    listing = Listing()
    seen: set[str] = set()

    def unlisted(error: OSError) -> None:
        listing.closed.append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        here, real = Path(parent), os.path.realpath(parent)
        loop = here.is_symlink() and here != folder and Path(os.path.realpath(here.parent)).is_relative_to(real)
        if loop:  # following it would list the images of other classes again
            listing.loops.append(here)
        if loop or real in seen:
            folders.clear()
            continue
        seen.add(real)
        listing.hidden += [here / name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            path = here / name
            if path.suffix.lower() in SUFFIXES:
                listing.images.append(path)
            elif path.is_symlink() and not path.exists():
                listing.closed.append(path)
            else:
                listing.others.append(path)
    listing.images.sort()
    return listing


def read_bytes(path: str | Path) -> bytes:
    """Read the encoded bytes of an image file.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        link = Path(path)
        target = f" It links to {link.readlink()}, which does not exist." if link.is_symlink() else ""
        raise DataError("{path} {reason}", path=path, reason=f"does not exist.{target}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(path, f"cannot be read: {error}.") from error


def stamp(path: str | Path) -> str | None:
    """Size, modification time, status-change time and inode of a file: equal as long as the file is unchanged.

    ``None`` if the file does not exist, or if it may still change without a new time: on a file system that counts in
    whole seconds, within the second of the last change.
    """
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    if changed % 10**9 == 0 and abs(time.time_ns() - changed) < 2 * 10**9:
        return None
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


@functools.cache
def _formats() -> list[str]:
    if READS_HEIC:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in Image.ID if name != "EPS"]  # EPS is a program, which Ghostscript would run


def open_image(content: bytes) -> Image.Image:
    """Open an image of any format that Pillow reads without an external program; pixels are decoded later."""
    return Image.open(io.BytesIO(content), formats=_formats())


def decode_image(content: bytes, name: str | Path, min_size: int = 0) -> Image.Image:
    """Decode an image to upright RGB.

    16-bit and float pixels are scaled to 8 bits (see :func:`pixel_maximum`), CMYK and palettes are converted,
    transparent images are composited on white, and of an animation the first frame is used.

    Args:
        content: The bytes of the file.
        name: Name of the image in errors.
        min_size: Smallest shorter side to decode to, in pixels; 0 decodes at full size. A JPEG at least twice as large
            is decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster.

    Raises:
        DataError: The content is truncated, or not an image.
    """
    if not content:
        raise _unreadable(name, "is empty: it has 0 bytes.")
    try:
        with open_image(content) as image:
            if min_size:
                image.draft(None, (min_size, min_size))  # has an effect on JPEG only
            return convert_image(image, name)
    except UnidentifiedImageError as error:
        raise _unreadable(name, "is not a readable image.") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise _unreadable(name, f"cannot be read: {str(error) or type(error).__name__}.") from error


def convert_image(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert a PIL image to upright RGB as :func:`decode_image` does, without changing the argument.

    Args:
        image: An image of any mode, decoded or not.
        name: Name of the image in errors.

    Raises:
        DataError: The image is truncated or its pixels are out of range.
    """
    try:
        depth = stated_depth(image)  # before Pillow closes the file
        image.load()
        if 0 in image.size:
            raise _unreadable(name, "has no pixels.")
        rotated = image.getexif().get(ORIENTATION, 1) != 1
        return _rgb(ImageOps.exif_transpose(image) if rotated else image, name, depth)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types on damaged bytes
        raise _unreadable(name, f"cannot be read: {str(error) or type(error).__name__}.") from error


def _unreadable(name: str | Path, reason: str) -> DataError:
    return DataError("{path} {reason} {hint}", path=name, reason=reason, hint="Repair or remove it.")


def _rgb(image: Image.Image, name: str | Path, depth: int | None) -> Image.Image:
    if depth and image.mode.startswith("RGB"):
        reason = f"has {depth}-bit colors in 16-bit pixels, of which Pillow reads the upper 8 bits only."
        raise DataError("{path} {reason} {hint}", path=name, reason=reason, hint="Convert or remove it.")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image, name, depth).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def stated_depth(image: Image.Image) -> int | None:
    """Bit depth that a 16-bit file states for its pixels: 10, 12 or 14; ``None`` if it states no such depth.

    A TIFF states it in BitsPerSample or, rounded up to a bit depth, in MaxSampleValue; a PNG in its sBIT chunk.

    Args:
        image: Opened and not decoded: Pillow closes the file afterwards.
    """
    if not image.mode.startswith("I") and ";16" not in str(getattr(image, "tile", "")):
        return None
    stated = None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]  # of TIFF images only
        (bits, *_) = np.ravel(tags.get(BITS_PER_SAMPLE, 16))
        (most, *_) = np.ravel(tags.get(MAX_SAMPLE_VALUE, 0))
        stated = int(bits) if bits < 16 or not most else next((n for n in CAMERA_DEPTHS if most < 2**n), None)
    elif image.format == "PNG" and (file := getattr(image, "fp", None)) is not None and file.seekable():
        position = file.tell()
        file.seek(0)
        header = file.read(1024)  # sBIT precedes the palette and the pixels
        file.seek(position)
        start = header.find(b"\0\0\0\1sBIT")
        stated = header[start + 8] if 0 <= start < len(header) - 8 else None
    return stated if stated in CAMERA_DEPTHS else None


def pixel_maximum(image: Image.Image, pixels: np.ndarray, depth: int | None) -> float | None:
    """Value of white in an image of 16-bit or float pixels; ``None`` if it cannot be known.

    It is the maximum of the bit depth that the file states, else the smallest range of the mode that fits. It is never
    the largest pixel, which would change the brightness of each image.

    Args:
        image: A decoded image of mode I, I;16 or F.
        pixels: Its pixels.
        depth: See :func:`stated_depth`.
    """
    low, high = float(pixels.min()), float(pixels.max())
    if depth and high < 2**depth:
        # A PNG with sBIT should fill all 16 bits, which leaves the low bits of dark pixels zero. Many do not.
        fills_16_bits = image.format == "PNG" and not np.any(pixels & (2 ** (16 - depth) - 1))
        return 65535.0 if fills_16_bits else 2.0**depth - 1
    ranges = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    # A float maximum of 1 to 16 would be nearly black in [0, 255], and is more likely to have another range.
    ambiguous = image.mode == "F" and 1 < high < 16
    return next((top for top in ranges if low >= 0 and high <= top and not ambiguous), None)


def _eight_bit(image: Image.Image, name: str | Path, depth: int | None) -> Image.Image:
    """Scale 16-bit and float pixels to 8 bits. Pillow clips them."""
    pixels = np.asarray(image)
    white = pixel_maximum(image, pixels, depth)
    if white is None:
        reason = f"has {image.mode} pixels from {pixels.min():g} to {pixels.max():g}, an unknown range."
        raise DataError("{path} {reason} {hint}", path=name, reason=reason, hint="Convert or remove it.")
    scaled = pixels * (255 / white)
    return Image.fromarray(np.round(scaled, out=scaled).astype(np.uint8))  # in place: 8 bytes per pixel


def read_image(path: str | Path, min_size: int = 0) -> Image.Image:
    """Read and decode an image file: :func:`read_bytes`, then :func:`decode_image`.

    Raises:
        DataError: The file is missing, truncated, or not an image.
    """
    return decode_image(read_bytes(path), path, min_size)


def traits(image: Image.Image) -> Iterator[str]:
    """Properties of an opened image that its decoding handles, such as its bit depth or orientation."""
    raw_modes = str(getattr(image, "tile", ""))
    depth = stated_depth(image)
    if depth:
        yield f"{depth}-bit"
    elif image.mode.startswith("I;16") or image.mode == "I" or ";16" in raw_modes:
        yield "16-bit"
    if image.mode in ("F", "CMYK", "P"):
        yield {"F": "float", "CMYK": "CMYK", "P": "palette"}[image.mode]
    if image.has_transparency_data:
        yield "transparent"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a second image appended
        yield "animated"
    if image.getexif().get(ORIENTATION) in range(2, 9):
        yield "turned by EXIF"
