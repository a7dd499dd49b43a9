"""A corpus of what people have in their folders: each image out of the ordinary, and what is to be said of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Write = Callable[[Path], None]


def picture(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """A picture unlike any of another seed: soft blotches."""
    blotches = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype="uint8")
    return Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image as a file's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bytes_of(content: bytes) -> Write:
    return lambda path: path.write_bytes(content) and None


def saved(image: Image.Image, **options: object) -> Write:
    return lambda path: image.save(path, **options)


def _dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone.jpg")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(20), exif=exif)


GREY = np.linspace(0, 65535, 4800).reshape(60, 80)
FULL = encoded(picture(1))

#: Files that cannot be decoded: what the doctor calls each, and how to write it.
UNREADABLE: dict[str, tuple[str, Write]] = {
    "truncated.jpg": ("truncated", bytes_of(FULL[: len(FULL) // 2])),
    "truncated.png": ("truncated", bytes_of(encoded(picture(2), "PNG")[:2000])),
    "empty.jpg": ("empty", bytes_of(b"")),
    "text.jpg": ("not an image", bytes_of(b"<html>404 not found</html>")),
    "bomb.png": ("too large", saved(Image.new("1", (20000, 20000)))),
    "dangling.jpg": ("unreadable", _dangling),
    "strange.tif": ("damaged", saved(Image.fromarray(np.float32(GREY) * 100))),
}
#: Files that are decoded as people expect.
UNUSUAL: dict[str, tuple[str, Write]] = {
    "deep.png": ("16-bit", saved(Image.fromarray(GREY.astype("uint16")))),
    "float.tif": ("float", saved(Image.fromarray((GREY[::-1] / 65535).astype("float32")))),
    "print.jpg": ("CMYK", saved(picture(11).convert("CMYK"))),
    "palette.gif": ("palette", saved(picture(12).quantize(64))),
    "alpha.png": ("transparent", saved(Image.merge("RGBA", (*picture(13).split(), picture(14).split()[0])))),
    "moves.gif": ("animated", saved(picture(15), save_all=True, append_images=[picture(16), picture(17)])),
    "turned.jpg": ("turned by EXIF", bytes_of(_turned())),
}
