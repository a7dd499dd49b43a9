import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from project.data.image_arrays import to_image
from project.data.image_io import list_images, read_image, traits
from project.errors import DataError
from tests.conftest import draw


def test_hidden_files_and_files_of_other_types_are_skipped(tmp_path: Path) -> None:
    for name in (".hidden.png", ".ipynb_checkpoints/a.png", "notes.txt", "b.PNG", "deep/er/a.jpg"):
        draw(tmp_path / name, (1, 2, 3), 0) if name.lower().endswith(("png", "jpg")) else (tmp_path / name).touch()
    assert list_images(tmp_path).images == [tmp_path / "b.PNG", tmp_path / "deep/er/a.jpg"]


def test_a_link_cycle_lists_each_image_once(tmp_path: Path) -> None:
    draw(tmp_path / "a/1.png", (1, 2, 3), 0)
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert list_images(tmp_path).images == [tmp_path / "a/1.png"]


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/1.png", (1, 2, 3), 0)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/ants").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "root").images == [tmp_path / "root/ants/1.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_converted_to_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 6), (200, 200, 200)).convert(mode).save(path)
    assert read_image(path).mode == "RGB"
    assert read_image(path).size == (8, 6)


def test_16_bit_pixels_are_scaled_to_8_bits(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype("uint16")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], (pixels / 257).round())


def _tiff(path: Path, pixels: np.ndarray, depth: int) -> None:
    """Write 16-bit pixels with a MaxSampleValue within the bit depth."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = 2**depth - 30
    Image.fromarray(pixels).save(path, "TIFF", tiffinfo=tags)


def _packed_tiff(path: Path, pixels: np.ndarray, depth: int) -> None:
    """Write 12-bit pixels packed into bytes, BitsPerSample 12, as microscopes do."""
    octets = pixels.astype(">u2")[..., None].view(np.uint8)
    packed = np.packbits(np.unpackbits(octets, axis=-1)[..., 16 - depth :].reshape(len(pixels), -1), axis=-1)
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: depth, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: packed.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + packed.size)
    path.write_bytes(header + packed.tobytes() + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0")


def _png(path: Path, pixels: np.ndarray, depth: int) -> None:
    """Write 16-bit pixels with an sBIT chunk."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    content, body = buffer.getvalue(), b"sBIT" + bytes([depth])
    chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(content[:33] + chunk + content[33:])  # behind the header


WRITERS: dict[str, tuple[Callable[[Path, np.ndarray, int], None], list[int]]] = {
    "tiff": (_tiff, [10, 12, 14]),
    "packed": (_packed_tiff, [12]),
    "png": (_png, [10, 12, 14]),
}


@pytest.mark.parametrize(("kind", "depth"), [(kind, depth) for kind, (_, all_) in WRITERS.items() for depth in all_])
@pytest.mark.parametrize("brightest", [1.0, 0.3])
def test_pixels_are_scaled_by_the_bit_depth_that_the_file_states(
    kind: str, depth: int, brightest: float, tmp_path: Path
) -> None:
    pixels = np.linspace(0, brightest * (2**depth - 1), 64).reshape(8, 8).astype("uint16")
    WRITERS[kind][0](tmp_path / "a", pixels, depth)
    image = read_image(tmp_path / "a")
    assert np.array_equal(np.asarray(image)[..., 0], (pixels * (255 / (2**depth - 1))).round())
    with Image.open(tmp_path / "a") as opened:
        assert f"{depth}-bit" in traits(opened)
        assert to_image(opened).tobytes() == image.tobytes(), "a PIL image gives the pixels of its file"


def test_a_png_that_fills_16_bits_is_not_brightened_by_its_sbit(tmp_path: Path) -> None:
    shades = np.linspace(0, 200, 64).reshape(8, 8).astype("uint16")  # dark, of 12 bits
    _png(tmp_path / "a.png", shades << 4, 12)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], ((shades << 4) / 257).round())


def test_pixels_above_the_stated_maximum_are_scaled_as_16_bits(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype("uint16")
    _tiff(tmp_path / "a.tif", pixels, 12)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 0], (pixels / 257).round())


def test_colours_of_12_bits_in_16_are_refused_by_name(tmp_path: Path) -> None:
    height = width = 4
    data = np.full((height, width, 3), 3000, "<u2").tobytes()
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 2), (273, 8), (277, 3), (278, 4), (279, len(data))]
    where = 8 + len(data)
    tags = [(tag, where if tag == 258 else value) for tag, value in tags] + [(281, where + 6)]
    counts = {258: 3, 281: 3}
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag in counts else 4, counts.get(tag, 1), value) for tag, value in tags
    )
    arrays = struct.pack("<6H", 16, 16, 16, 4095, 4095, 4095)
    directory = struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHI", b"II", 42, where + len(arrays)) + data + arrays + directory)
    with pytest.raises(DataError, match=r"a\.tif has 12-bit colors in 16-bit pixels.*Convert or remove"):
        read_image(path)


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_float_pixels_are_scaled_from_the_smallest_range_that_fits(top: int, tmp_path: Path) -> None:
    pixels = np.linspace(0, top, 64, dtype="float32").reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 1], (pixels * (255 / top)).round())


@pytest.mark.parametrize("value", [-1, 1e6, float("nan"), float("inf")])
def test_float_pixels_out_of_range_are_refused(value: float, tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 64, dtype="float32").reshape(8, 8)
    pixels[3, 3] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has F pixels from .*, an unknown range\. Convert or remove"):
        read_image(tmp_path / "a.tif")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((10, 20, 3), dtype="uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_truncated_image_is_refused_by_name(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.jpg"):
        read_image(path)


def test_a_missing_image_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
