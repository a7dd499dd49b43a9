"""Unusual images are decoded correctly; unreadable images and tables are rejected by name."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from project.data.image_index import examine
from project.data.image_io import decode_image, read_image
from project.data.sources.base import Sample
from project.data.sources.files import Files
from project.data.sources.manifest import Manifest
from project.errors import DataError
from tests.data.corpus import UNREADABLE, UNUSUAL, encoded, picture


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    kind, write = UNREADABLE[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)
    info = examine(Files(), Sample(str(tmp_path / name), 0))
    assert info.kind == kind and info.error and name not in info.error.split("gone")[0]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_image_is_decoded_and_its_trait_reported(name: str, tmp_path: Path) -> None:
    trait, write = UNUSUAL[name]
    write(tmp_path / name)
    info = examine(Files(), Sample(str(tmp_path / name), 0))
    assert not info.error and trait in info.traits
    image = read_image(tmp_path / name)
    assert image.mode == "RGB" and image.getexif().get(0x0112) is None
    assert image.size == ((60, 80) if name == "turned.jpg" else (80, 60))
    assert np.ptp(np.asarray(image)) > 100, "pixels are not clipped to white or black"


def test_transparent_pixels_are_drawn_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), "uint8")
    pixels[:2] = (255, 0, 0, 255)
    pixels[2:, :2] = (0, 0, 255, 128)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 255, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.gif", transparency=1)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    Image.fromarray(np.dstack([pixels[..., 0], pixels[..., 3]])).save(tmp_path / "grey.png")
    alpha, grey, indexed = (read_image(tmp_path / name) for name in ("alpha.png", "grey.png", "palette.gif"))
    assert alpha.getpixel((0, 0)) == (255, 0, 0) and alpha.getpixel((3, 3)) == (255, 255, 255)
    assert alpha.getpixel((0, 3)) == pytest.approx((127, 127, 255), abs=1)
    assert grey.getpixel((0, 0)) == (255, 255, 255) and grey.getpixel((0, 3)) == pytest.approx((127, 127, 127), abs=1)
    assert indexed.getpixel((0, 0)) == (0, 255, 0) and indexed.getpixel((3, 3)) == (255, 255, 255)


def test_animation_is_read_as_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_large_jpeg_is_decoded_at_a_reduced_size_of_at_least_min_size() -> None:
    content = encoded(picture(3, 1600, 1200), quality=95)
    assert decode_image(content, "a.jpg").size == (1600, 1200)
    assert [decode_image(content, "a.jpg", min_size).size[1] for min_size in (0, 1200, 601, 600, 299, 100)] == [
        *(1200, 1200, 1200, 600, 300, 150)
    ]
    reduced = np.asarray(decode_image(content, "a.jpg", 300), float)
    full = np.asarray(decode_image(content, "a.jpg").resize((400, 300), Image.Resampling.BOX), float)
    assert np.abs(reduced - full).mean() < 1.5


FORMATS = {
    kind: encoded(picture(4), kind, **({"lossless": True} if kind == "WEBP" else {}))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000")
}


def decode_or_reject(content: bytes) -> Image.Image | None:
    """The image, or ``None`` if it is rejected. Any other exception fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
            image = decode_image(content, "some.jpg")
    except DataError as error:
        assert str(error).startswith("some.jpg ")
        return None
    assert image.mode == "RGB"
    return image


@given(st.binary(max_size=300), st.sampled_from([b"", *(content[:20] for content in FORMATS.values())]))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_rejected(content: bytes, head: bytes) -> None:
    image = decode_or_reject(head + content)
    assert image is None or image.size != (80, 60), "random bytes do not make a whole image"


@given(st.sampled_from(sorted(FORMATS)), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_truncated_image_is_rejected_or_complete(kind: str, share: float) -> None:
    content = FORMATS[kind]
    image = decode_or_reject(content[: int(share * len(content))])
    if image is not None:  # only bytes after the pixels are missing
        assert np.array_equal(np.asarray(image), np.asarray(decode_or_reject(content)))


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_altered_image_is_rejected_or_decoded(kind: str, at: int, change: int) -> None:
    content = bytearray(FORMATS[kind])
    content[at % len(content)] ^= change
    decode_or_reject(bytes(content))


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=12)
tables = st.lists(
    st.tuples(
        st.sampled_from(["a.jpg", "b.jpg", "c/d.png", "", " e.jpg "]) | cells,
        st.sampled_from(["cat", "dog", "Cat", ""]) | cells,
        st.sampled_from(["train", "val", "test", "", "Train", "valid"]) | cells,
    ),
    max_size=30,
)


@given(tables)
@settings(max_examples=200, deadline=None)
def test_each_row_of_a_manifest_is_a_sample_or_a_reported_bad_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list
) -> None:
    import csv

    file = tmp_path_factory.mktemp("table") / "a.csv"
    out = io.StringIO()
    csv.writer(out).writerows([("path", "label", "split"), *rows])
    file.write_text(out.getvalue(), "utf-8", newline="")
    source = Manifest(str(file))
    samples = [sample for split in source.splits.values() for sample in split]
    bad = [name for finding in source.findings if finding.kind == "bad row" for name in finding.names]
    assert len(samples) + len(bad) == sum(any(cell.lstrip(" ") for cell in row) for row in rows)
    assert len({sample.name for sample in samples}) == len(samples)
    if bad or len(source.classes) < 2:
        with pytest.raises(DataError, match=r"a\.csv"):
            source.require()


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_table_of_random_bytes_is_rejected(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    for suffix in (".csv", ".tsv", ".parquet"):
        file = tmp_path_factory.mktemp("table") / f"a{suffix}"
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\{suffix}"):
            Manifest(str(file)).require()
