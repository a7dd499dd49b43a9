from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project.data.image_io import list_images, read_image
from project.errors import DataError
from tests.conftest import draw


def test_hidden_files_and_other_kinds_of_file_are_left_out(tmp_path: Path) -> None:
    for name in (".hidden.png", ".ipynb_checkpoints/a.png", "notes.txt", "b.PNG", "deep/er/a.jpg"):
        draw(tmp_path / name, (1, 2, 3), 0) if name.lower().endswith(("png", "jpg")) else (tmp_path / name).touch()
    assert list_images(tmp_path).images == [tmp_path / "b.PNG", tmp_path / "deep/er/a.jpg"]


def test_a_loop_of_links_lists_an_image_once(tmp_path: Path) -> None:
    draw(tmp_path / "a/1.png", (1, 2, 3), 0)
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert list_images(tmp_path).images == [tmp_path / "a/1.png"]


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/1.png", (1, 2, 3), 0)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/ants").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "root").images == [tmp_path / "root/ants/1.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 6), (200, 200, 200)).convert(mode).save(path)
    assert read_image(path).mode == "RGB"
    assert read_image(path).size == (8, 6)


def test_16_bit_pixels_are_rescaled(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype("uint16")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], (pixels / 257).round())


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_float_pixels_are_rescaled_from_the_range_they_are_in(top: int, tmp_path: Path) -> None:
    pixels = np.linspace(0, top, 64, dtype="float32").reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 1], (pixels * (255 / top)).round())


@pytest.mark.parametrize("strange", [-1, 1e6, float("nan"), float("inf")])
def test_float_pixels_of_unknown_meaning_are_refused(strange: float, tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 64, dtype="float32").reshape(8, 8)
    pixels[3, 3] = strange
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has pixels of F .* Convert or remove"):
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
    with pytest.raises(DataError, match=r"gone\.png is not there"):
        read_image(tmp_path / "gone.png")
