"""Finding image files, and reading one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from project.errors import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


def find_images(folder: Path) -> list[Path]:
    """List the image files under a folder, in order of their names.

    Links to folders are followed, each real folder once; hidden files and folders are left out.

    Args:
        folder: Where to look, at any depth.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a loop of links
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name) for name in files if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found)


def _eight_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """Rescale 16-bit and float pixels, which Pillow would cut off: white, and black."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise DataError(f"{path} has float pixels outside [0, 1], whose meaning is unknown. Convert or remove it.")
        return Image.fromarray((pixels * 255).round().astype(np.uint8))
    return image


def read_bytes(path: str | Path) -> bytes:
    """Read an image file as it lies on disk, not decoded.

    Raises:
        DataError: The file is missing or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Mend or remove it.") from error


def decode_image(content: bytes, name: str | Path) -> Image.Image:
    """Decode an image whole, upright and in RGB.

    Args:
        content: The bytes of its file.
        name: What to call it in an error.

    Returns:
        An RGB image, turned as its EXIF orientation says; 16-bit pixels, and float ones in [0, 1], are rescaled.

    Raises:
        DataError: It is truncated, or no image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _eight_bit(ImageOps.exif_transpose(image), name).convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image that can be read. Mend or remove it.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read: {error}. Mend or remove it.") from error


def read_image(path: str | Path) -> Image.Image:
    """Read an image file whole, upright and in RGB: :func:`read_bytes`, then :func:`decode_image`.

    Raises:
        DataError: The file is missing, truncated, or no image.
    """
    return decode_image(read_bytes(path), path)
