"""Every form of an image converts to the pixels that its file decodes to."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from project.data.image_arrays import to_image
from project.data.image_io import read_image
from project.errors import DataError

RANDOM = np.random.default_rng(0)
GREY16 = RANDOM.integers(0, 65536, (24, 32), dtype=np.uint16)
RGBA = RANDOM.integers(0, 256, (24, 32, 4), dtype=np.uint8)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # rotated by 90 degrees

#: Plain files, and files that Pillow's ``convert("RGB")`` converts wrongly.
FILES: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: Image.fromarray(RGBA[..., :3]).save(path),
    "grey.png": lambda path: Image.fromarray(RGBA[..., 0]).save(path),
    "grey16.png": lambda path: Image.fromarray(GREY16).save(path),
    "grey16.tif": lambda path: Image.fromarray(GREY16).save(path),
    "float.tif": lambda path: Image.fromarray((GREY16 / 65535).astype(np.float32)).save(path),
    "alpha.png": lambda path: Image.fromarray(RGBA).save(path),
    "grey_alpha.png": lambda path: Image.fromarray(RGBA[..., :2], "LA").save(path),
    "palette_alpha.png": lambda path: Image.fromarray(RGBA).quantize(16).save(path),
    "palette_key.png": lambda path: Image.fromarray(RGBA[..., :3]).quantize(16).save(path, transparency=3),
    "cmyk.jpg": lambda path: Image.fromarray(RGBA[..., :3]).convert("CMYK").save(path),
    "rotated.jpg": lambda path: Image.fromarray(RGBA[..., :3]).save(path, exif=ROTATED),
}
FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "PIL, not loaded": Image.open,
    "PIL, loaded": lambda path: _loaded(Image.open(path)),
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open file": lambda path: io.BytesIO(path.read_bytes()),
}


def _closed() -> io.BytesIO:
    file = io.BytesIO(b"...")
    file.close()
    return file


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_pixels_of_the_file(name: str, form: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    with read_image(tmp_path / name) as file:
        given = FORMS[form](tmp_path / name)
        image = to_image(given)
        assert image.mode == "RGB" and image.size == file.size
        assert image.tobytes() == file.tobytes()
    if isinstance(given, Image.Image):
        assert given.size == (32, 24), "the caller's image is unchanged"
        given.close()


#: Pixels ``(H, W[, C])`` and the file that has them.
ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "grey": (RGBA[..., 0], "grey.png"),
    "grey with a channel": (RGBA[..., :1], "grey.png"),
    "grey and alpha": (RGBA[..., :2], "grey_alpha.png"),
    "rgb": (RGBA[..., :3], "rgb.png"),
    "rgba": (RGBA, "alpha.png"),
    "uint16": (GREY16, "grey16.png"),
    "big-endian": (GREY16.astype(">u2"), "grey16.png"),
    "float32": ((RGBA[..., :3] / 255).astype(np.float32), "rgb.png"),
    "float64": (RGBA[..., :3] / 255, "rgb.png"),
    "negative strides": (np.ascontiguousarray(RGBA[::-1, ..., :3])[::-1], "rgb.png"),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_arrays_and_tensors_give_the_pixels_of_the_file(name: str, kind: str, tmp_path: Path) -> None:
    pixels, file = ARRAYS[name]
    FILES[file](tmp_path / file)
    given: Any = pixels
    if kind == "tensor":
        given = torch.from_numpy(pixels.astype(pixels.dtype.newbyteorder("=")))
        given = given.movedim(-1, 0) if given.dim() == 3 else given
    assert to_image(given).tobytes() == read_image(tmp_path / file).tobytes()


def test_half_precision_tensors_are_read(tmp_path: Path) -> None:
    ones = torch.ones(3, 4, 4)
    assert to_image(ones.half()).getpixel((0, 0)) == (255, 255, 255)
    assert to_image(ones.bfloat16()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), "An image cannot have shape (4, 4, 5)"),
        (np.zeros((0, 4, 3), np.uint8), "An image cannot have shape (0, 4, 3)"),
        (torch.zeros(9, 4, 3), "An image cannot have shape (9, 4, 3)"),
        (np.full((4, 4, 3), 1.5), "Float pixels must be in [0, 1]; these are in [1.5, 1.5]."),
        (torch.full((3, 4, 4), -0.1), "Float pixels must be in [0, 1]; these are in [-0.1, -0.1]."),
        (np.full((4, 4, 3), np.nan), "Float pixels must be in [0, 1]"),
        (np.zeros((4, 4, 3), np.int64), "Pixels must be uint8, uint16 or float in [0, 1], not int64."),
        (np.zeros((4, 4, 3), bool), "Pixels must be uint8, uint16 or float in [0, 1], not bool."),
        (torch.zeros(3, 4, 4).to_sparse(), "An image tensor must be dense"),
        (torch.zeros(3, 4, 4, device="meta"), "An image tensor must be dense"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (_closed(), "The image cannot be read: I/O operation on closed file"),
        (b"", "The image is empty"),
        (b"no image", "The image is not a readable image"),
    ],
)
def test_an_invalid_image_is_refused_with_the_reason(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        to_image(given)


def test_another_type_is_refused_with_the_accepted_types() -> None:
    with pytest.raises(TypeError, match=r"a path, bytes, an open file, a PIL image, an array .*, not a dict"):
        to_image({})  # type: ignore[arg-type]
