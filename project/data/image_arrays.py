"""Conversion of paths, bytes, PIL images, arrays and tensors to upright 8-bit RGB images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import torch
from PIL import Image

from project.data.image_io import convert_image, decode_image, read_image
from project.errors import DataError

#: One image: a path, the bytes of a file, an open file, a PIL image, an array ``(H, W)`` or ``(H, W, C)``, or a tensor
#: ``(C, H, W)``.
ImageLike = str | Path | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray | torch.Tensor
#: Pixel value of white for each integer dtype. Floats are in [0, 1].
LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_images(image: ImageLike, min_sizes: Sequence[int]) -> list[Image.Image]:
    """Decode or convert an image for several transforms, see :func:`to_image`.

    Args:
        image: See :data:`ImageLike`. An open file is read once.
        min_sizes: Smallest shorter side for each transform.
    """
    if _is_open_file(image):
        content, name = _read(image)
        decoded = {size: decode_image(content, name, size) for size in {*min_sizes}}
    else:
        decoded = {size: to_image(image, size) for size in {*min_sizes}}
    return [decoded[size] for size in min_sizes]


def to_image(image: ImageLike, min_size: int = 0) -> Image.Image:
    """Decode or convert an image to upright RGB.

    Args:
        image: See :data:`ImageLike`. Arrays and tensors have 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA)
            channels and are uint8, uint16, or float in [0, 1].
        min_size: Smallest shorter side to decode a file to, see :func:`~project.data.image_io.decode_image`; 0 decodes
            at full size. PIL images, arrays and tensors keep their size.

    Raises:
        DataError: The image cannot be read, or its pixels are out of range.
        TypeError: The argument is of another type.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, min_size)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), "The image", min_size)
    if isinstance(image, Image.Image):
        return convert_image(image, getattr(image, "filename", "") or "The image")
    if isinstance(image, torch.Tensor):
        if image.layout != torch.strided or image.device.type == "meta":
            raise DataError(f"An image tensor must be dense, not {image.layout} on {image.device}.")
        tensor = image.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bfloat16
        return _from_array((tensor.movedim(0, -1) if tensor.dim() == 3 else tensor).numpy(), tuple(image.shape))
    if isinstance(image, np.ndarray):
        return _from_array(image, image.shape)
    if _is_open_file(image):
        return decode_image(*_read(image), min_size)
    raise TypeError(
        "An image is a path, bytes, an open file, a PIL image, an array (H, W, C) or a tensor (C, H, W), not a "
        f"{type(image).__name__}."
    )


def _is_open_file(image: Any) -> TypeGuard[IO[bytes]]:
    return isinstance(image, io.IOBase) or hasattr(image, "read")


def _read(file: IO[bytes]) -> tuple[bytes, str]:
    """The content of an open file, and its name for errors."""
    try:
        return file.read(), getattr(file, "name", "") or "The image"
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise DataError(f"The image cannot be read: {error}.") from error


def _from_array(pixels: np.ndarray, shape: tuple[int, ...]) -> Image.Image:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in MODES or not pixels.size:
        raise DataError(
            f"An image cannot have shape {shape}: arrays are (H, W) or (H, W, C), tensors (C, H, W), "
            "with 1 to 4 channels."
        )
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:  # false for NaN too
            raise DataError(f"Float pixels must be in [0, 1]; these are in [{low:g}, {high:g}].")
        pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype in LARGEST:
        pixels = (pixels * (255 / LARGEST[pixels.dtype])).round().astype(np.uint8)
    else:
        raise DataError(f"Pixels must be uint8, uint16 or float in [0, 1], not {pixels.dtype}.")
    mode = MODES[pixels.shape[2]]
    return convert_image(Image.fromarray(pixels.squeeze(2) if mode == "L" else np.ascontiguousarray(pixels), mode), "")
