"""Image folders of any size, made from a few hundred photographs that are repeated with distinct bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg")


def repeat(root: Path, into: Path, train: int, val: int) -> Path:
    """Write ``into/{train,val}/CLASS/*.jpg`` with the given numbers of images, each with distinct bytes.

    A JPEG decoder stops at the end-of-image marker. A number appended to the file therefore changes its SHA-256, and
    with it the key of its row, but no pixel.

    Args:
        root: ``{train,val}/CLASS/*.jpg``.
        into: Output folder.
        train: Number of training images.
        val: Number of validation images.

    Raises:
        FileNotFoundError: A split has no JPEG files.
    """
    for split, count in (("train", train), ("val", val)):
        files = sorted(file for file in (root / split).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise FileNotFoundError(f"No JPEG files in {root / split}.")
        by_class = [list(group) for _, group in itertools.groupby(files, lambda file: file.parent.name)]
        # Interleave the classes, so that a small count still has all of them.
        interleaved = [file for group in itertools.zip_longest(*by_class) for file in group if file is not None]
        for number, file in zip(range(count), itertools.cycle(interleaved), strict=False):
            target = into / split / file.parent.name / f"{number:06}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes() + number.to_bytes(4, "little"))
    return into


def shrink(root: Path, into: Path, side: int = 256) -> Path:
    """Write ``into/{train,val}/CLASS/*.jpg`` with a shorter side of at most ``side`` pixels; they decode fast."""
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in SUFFIXES:
            continue
        with Image.open(file) as image:
            image.draft("RGB", (side, side))
            scale = min(side / min(image.size), 1)
            small = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
        target = into / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        small.save(target, quality=90)
    return into


def generate(into: Path, classes: int = 3, count: int = 12, side: int = 96) -> Path:
    """Write noise images with one mean colour per class as ``into/{train,val}/CLASS/*.jpg``."""
    generator = np.random.default_rng(0)
    for split, number in itertools.product(("train", "val"), range(classes)):
        folder = into / split / f"class{number}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = np.roll([200, 40, 40], number)
        for index in range(count):
            pixels = (colour + generator.integers(-40, 40, (side, side, 3))).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    return into
