"""The evaluation transform as an ONNX graph: resize as Pillow does, center crop."""

from __future__ import annotations

from typing import Any

from project.errors import ConfigError
from project.preprocessing import Preprocessing

#: Attributes of ONNX's ``Resize`` for each Pillow filter.
FILTERS = {"bilinear": 'mode = "linear"', "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5'}

#: The sizes are those of ``torchvision.transforms``: the longer edge is truncated, half a pixel of the crop is rounded
#: to even. ``Resize`` gets uint8, for which ONNX Runtime computes as Pillow does: in integers, one direction after the
#: other.
TEXT = """
<ir_version: 10, opset_import: ["": 18]>
preprocessing (uint8[N, H, W, 3] images) => (uint8[N, 3, {crop}, {crop}] pixels) {{
    channels_first = Transpose <perm = [0, 3, 1, 2]> (images)
    size = Shape <start = 2> (channels_first)
    shorter = ReduceMin <keepdims = 1> (size)
    resize = Constant <value = int64[1] {{{resize}}}> ()
    scaled = Mul (size, resize)
    target = {target}
    batch_and_channels = Shape <end = 2> (channels_first)
    sizes = Concat <axis = 0> (batch_and_channels, target)
    resized = Resize <{filter}, antialias = 1, exclude_outside = 1> (channels_first, , , sizes)
    crop = Constant <value = int64[2] {{{crop}, {crop}}}> ()
    margin = Sub (target, crop)
    margin_float = Cast <to = 1> (margin)
    half = Constant <value = float {{0.5}}> ()
    start_float = Mul (margin_float, half)
    start_rounded = Round (start_float)
    start = Cast <to = 7> (start_rounded)
    end = Add (start, crop)
    axes = Constant <value = int64[2] {{2, 3}}> ()
    pixels = Slice (resized, start, end, axes)
}}
"""


def preprocessing_graph(preprocessing: Preprocessing) -> Any:
    """The graph from images ``(N, H, W, 3)`` to the input of the network ``(N, 3, crop, crop)``, both uint8.

    The pixels equal those of :func:`project.data.transforms.evaluation`, except for a difference of 1 in about one of
    ten thousand.

    Args:
        preprocessing: Preprocessing of the weights.

    Returns:
        An ``onnx.ModelProto`` with dynamic N, H and W.

    Raises:
        ConfigError: ONNX has no operator for the interpolation.
    """
    import onnx

    if preprocessing.interpolation not in FILTERS:
        raise ConfigError(
            f"export: ONNX cannot resize with {preprocessing.interpolation} interpolation. "
            f"Weights with one of these can be exported: {', '.join(FILTERS)}."
        )
    both = f"Constant <value = int64[2] {{{preprocessing.resize}, {preprocessing.resize}}}> ()"
    text = TEXT.format(
        crop=preprocessing.crop,
        resize=preprocessing.resize,
        filter=FILTERS[preprocessing.interpolation],
        target=both if preprocessing.squash else "Div (scaled, shorter)",
    )
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model
