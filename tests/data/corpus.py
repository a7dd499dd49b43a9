"""Generators of unreadable and unusual image files, with the finding that ``check`` reports for each."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Write = Callable[[Path], None]


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """A picture of soft blotches. Pictures of different seeds are not near-duplicates."""
    blotches = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype="uint8")
    return Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Encode an image as the bytes of a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_content(content: bytes) -> Write:
    """Return a function that writes these bytes to a path."""
    return lambda path: path.write_bytes(content) and None


def save_image(image: Image.Image, **options: object) -> Write:
    """Return a function that saves the image to a path."""
    return lambda path: image.save(path, **options)


def _write_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.jpg")


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(20), exif=exif)


GREY = np.linspace(0, 65535, 4800).reshape(60, 80)
FULL = encoded(picture(1))

#: Files that cannot be decoded, with the kind of finding and a function that writes the file.
UNREADABLE: dict[str, tuple[str, Write]] = {
    "truncated.jpg": ("truncated", write_content(FULL[: len(FULL) // 2])),
    "truncated.png": ("truncated", write_content(encoded(picture(2), "PNG")[:2000])),
    "empty.jpg": ("empty", write_content(b"")),
    "text.jpg": ("not an image", write_content(b"<html>404 not found</html>")),
    "bomb.png": ("too large", save_image(Image.new("1", (20000, 20000)))),
    "dangling.jpg": ("unreadable", _write_dangling_link),
    "strange.tif": ("damaged", save_image(Image.fromarray(np.float32(GREY) * 100))),
}
#: Files that need special handling to be decoded, with their trait and a function that writes the file.
UNUSUAL: dict[str, tuple[str, Write]] = {
    "deep.png": ("16-bit", save_image(Image.fromarray(GREY.astype("uint16")))),
    "float.tif": ("float", save_image(Image.fromarray((GREY[::-1] / 65535).astype("float32")))),
    "print.jpg": ("CMYK", save_image(picture(11).convert("CMYK"))),
    "palette.gif": ("palette", save_image(picture(12).quantize(64))),
    "alpha.png": ("transparent", save_image(Image.merge("RGBA", (*picture(13).split(), picture(14).split()[0])))),
    "moves.gif": ("animated", save_image(picture(15), save_all=True, append_images=[picture(16), picture(17)])),
    "turned.jpg": ("turned by EXIF", write_content(_rotated())),
}
