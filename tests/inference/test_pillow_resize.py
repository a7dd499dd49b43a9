"""The preprocessing of exported files gives the pixels of Pillow, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from project.data.transforms import evaluation
from project.errors import ConfigError
from project.inference.exported_network import WithPreprocessing
from project.inference.pillow_resize import parts_of
from project.inference.preprocessing_graph import preprocessing_graph
from project.preprocessing import Preprocessing

#: Heights and widths: edges of one pixel, the size of the crop, and large ones.
SIZES = [(1, 1), (1, 30), (30, 1), (32, 32), (37, 37), (64, 64), (33, 200), (1200, 70), (640, 1000)]


def settings(interpolation: str, resize: int, crop: int, squash: bool) -> Preprocessing:
    return Preprocessing(resize, crop, interpolation, (0.5,) * 3, (0.5,) * 3, squash)


def pictures(seed: int) -> Iterator[np.ndarray]:
    """Noise, and black and white noise, on which a cubic filter exceeds 0 to 255."""
    generator = np.random.default_rng(seed)
    sizes = [*SIZES, *generator.integers(1, 400, (20, 2)).tolist()]
    for number, (height, width) in enumerate(sizes):
        values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield values if number % 2 else (values > 127) * np.uint8(255)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("resize", "crop", "squash"),
    [(32, 32, False), (37, 32, False), (36, 31, False), (35, 32, True), (3, 2, True), (129, 127, False)],
)
def test_pixels_equal_those_of_pillow(interpolation: str, resize: int, crop: int, squash: bool) -> None:
    import onnxruntime

    preprocessing = settings(interpolation, resize, crop, squash)
    graph = preprocessing_graph(preprocessing).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    program = WithPreprocessing(torch.nn.Identity(), preprocessing)
    for pixels in pictures(resize):
        expected = evaluation(preprocessing)(Image.fromarray(pixels)).numpy()
        (by_onnx,) = session.run(None, {"images": pixels[None]})
        np.testing.assert_array_equal(by_onnx[0], expected)
        np.testing.assert_array_equal(program(torch.from_numpy(pixels)[None])[0].numpy(), expected)


def test_each_image_of_a_batch_is_resized() -> None:
    preprocessing = settings("bicubic", 37, 32, False)
    images = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    resized = WithPreprocessing(torch.nn.Identity(), preprocessing)(torch.from_numpy(images))
    for pixels, expected in zip(images, resized, strict=True):
        assert torch.equal(evaluation(preprocessing)(Image.fromarray(pixels)), expected)


@pytest.mark.parametrize(("length", "parts"), [(224, 8), (7, 8), (10, 4)])
def test_parts_cover_the_length(length: int, parts: int) -> None:
    lengths = parts_of(length, parts)
    assert sum(lengths) == length and len(lengths) == min(length, parts) and min(lengths) > 0


@pytest.mark.parametrize(
    "write", [preprocessing_graph, lambda settings: WithPreprocessing(torch.nn.Identity(), settings)]
)
def test_other_interpolation_is_refused(write) -> None:
    with pytest.raises(ConfigError, match="cannot resize with lanczos interpolation"):
        write(settings("lanczos", 32, 32, False))
