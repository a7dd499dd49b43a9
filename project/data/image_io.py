"""Finding image files, and reading one."""

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

#: What iPhones write; read where ``pillow-heif`` is installed.
HEIC = (".heic", ".heif")
READS_HEIC = importlib.util.find_spec("pillow_heif") is not None
SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".ico"),
        *(HEIC if READS_HEIC else ()),
    )
)


#: Part of what stored features are known by: to be raised when an image comes out otherwise than before.
DECODING = 2
ORIENTATION = 0x0112  # tag of EXIF


@dataclass
class Listing:
    """What is under a folder.

    Attributes:
        images: Files that are images by their names, in order of their paths.
        hidden: Files and folders that are left out, because their names begin with a dot.
        others: Files that are left out, because no image that can be read has such a name.
        loops: Links to a folder that holds them.
        closed: Folders that cannot be listed, and links to folders that are gone.
    """

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    loops: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """List what is under a folder.

    Links to folders are followed, each real folder once. A link to a file that is gone is listed: reading it will tell.

    Args:
        folder: Where to look, at any depth.
    """
    found = Listing()
    seen: set[str] = set()

    def unlisted(error: OSError) -> None:
        found.closed.append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        here, real = Path(parent), os.path.realpath(parent)
        loop = here.is_symlink() and here != folder and Path(os.path.realpath(here.parent)).is_relative_to(real)
        if loop:  # followed, it would list the images of other classes too
            found.loops.append(here)
        if loop or real in seen:
            folders.clear()
            continue
        seen.add(real)
        found.hidden += [here / name for name in (*folders, *files) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            path = here / name
            if path.suffix.lower() in SUFFIXES:
                found.images.append(path)
            elif path.is_symlink() and not path.exists():
                found.closed.append(path)
            else:
                found.others.append(path)
    found.images.sort()
    return found


def read_bytes(path: str | Path) -> bytes:
    """Read an image file as it lies on disk, not decoded.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        link = Path(path)
        gone = f" It links to {link.readlink()}, which is gone." if link.is_symlink() else ""
        raise DataError("{path} {reason}", path=path, reason=f"is not there.{gone}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unreadable(path, f"cannot be read: {error}.") from error


def stamp(path: str | Path) -> str | None:
    """Size, times of the last change of content and of state, and inode of a file.

    ``None`` if there is no file, or if another change could leave all of these as they are: on a file system that
    counts in whole seconds, while the second of the last change lasts.
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
    return [name for name in Image.ID if name != "EPS"]  # it is a program, which Ghostscript would run


def open_image(content: bytes) -> Image.Image:
    """Open an image of any format that can be read without another program; nothing is decoded yet."""
    return Image.open(io.BytesIO(content), formats=_formats())


def decode_image(content: bytes, name: str | Path, min_size: int = 0) -> Image.Image:
    """Decode an image whole, upright and in RGB.

    16-bit and float pixels are rescaled, CMYK and palettes are converted, what is transparent lies on white, and of an
    animation the first frame is taken.

    Args:
        content: The bytes of its file.
        name: What to call it in an error.
        min_size: Pixels that the shorter side needs; 0 for all. A JPEG file of twice as many or more is decoded at a
            half, a quarter or an eighth of its size, the smallest that has them: several times as fast.

    Raises:
        DataError: It is truncated, or no image.
    """
    if not content:
        raise _unreadable(name, "is empty: it has 0 bytes.")
    try:
        with open_image(content) as image:
            if min_size:
                image.draft(None, (min_size, min_size))  # JPEG alone; of another format it does nothing
            return convert_image(image, name)
    except UnidentifiedImageError as error:
        raise _unreadable(name, "is not an image that can be read.") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers of a format raise whatever comes of damaged bytes
        raise _unreadable(name, f"cannot be read: {str(error) or type(error).__name__}.") from error


def convert_image(image: Image.Image, name: str | Path) -> Image.Image:
    """Decode an opened image upright and in RGB, as :func:`decode_image` does; the image itself is not changed.

    Args:
        image: Of any mode, decoded or not.
        name: What to call it in an error.

    Raises:
        DataError: It is truncated.
    """
    try:
        image.load()
        if 0 in image.size:
            raise _unreadable(name, "has no pixels.")
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return _rgb(ImageOps.exif_transpose(image) if turned else image, name)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers of a format raise whatever comes of damaged bytes
        raise _unreadable(name, f"cannot be read: {str(error) or type(error).__name__}.") from error


def _unreadable(name: str | Path, reason: str) -> DataError:
    return DataError("{path} {reason} {hint}", path=name, reason=reason, hint="Mend or remove it.")


def _rgb(image: Image.Image, name: str | Path) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _eight_bit(image, name).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image, name: str | Path) -> Image.Image:
    """Rescale 16-bit and float pixels, which Pillow would cut off: white, and black."""
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    # By the largest pixel: below a sixteenth of a range, it would be nearly black, and is more likely of another one.
    tops = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    scale = next((top for top in tops if high <= top), 0.0)
    strange = image.mode == "F" and 1 < high < 16
    if strange or not (low >= 0 and scale):
        reason = f"has pixels of {image.mode} from {low:g} to {high:g}, of unknown meaning."
        raise DataError("{path} {reason} {hint}", path=name, reason=reason, hint="Convert or remove it.")
    return Image.fromarray((pixels * (255 / scale)).round().astype(np.uint8))


def read_image(path: str | Path, min_size: int = 0) -> Image.Image:
    """Read an image file whole, upright and in RGB: :func:`read_bytes`, then :func:`decode_image`.

    Raises:
        DataError: The file is missing, truncated, or no image.
    """
    return decode_image(read_bytes(path), path, min_size)


def traits(image: Image.Image) -> Iterator[str]:
    """What of an opened image is out of the ordinary, and taken care of when it is decoded."""
    raw = str(getattr(image, "tile", ""))
    if image.mode.startswith("I;16") or image.mode == "I" or ";16" in raw:
        yield "16-bit"
    if image.mode == "F":
        yield "float"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.mode == "P":
        yield "palette"
    if image.has_transparency_data:
        yield "transparent"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a second one behind it
        yield "animated"
    if image.getexif().get(ORIENTATION) in range(2, 9):
        yield "turned by EXIF"
