"""The evaluation transform as an ONNX graph: the resize of Pillow, bit for bit, and the center crop."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

from project.inference.pillow_resize import PRECISION_BITS, SUPPORT, parts_of, require_filter
from project.preprocessing import Preprocessing

#: Parts of a row that are resampled one after the other, each from the pixels that it depends on.
PARTS = 8

#: Steps from the distance ``x`` to the value ``raw`` of a filter, both double.
FILTERS = {
    "bilinear": """
        falling = Sub (one, x)
        raw = Max (falling, zero)""",
    "bicubic": """
        near1 = Mul (x, c1_5)
        near2 = Sub (near1, c2_5)
        near3 = Mul (near2, x)
        near4 = Mul (near3, x)
        near = Add (near4, one)
        far1 = Sub (x, five)
        far2 = Mul (far1, x)
        far3 = Add (far2, eight)
        far4 = Mul (far3, x)
        far5 = Sub (far4, four)
        far = Mul (far5, minus_half)
        is_near = Less (x, one)
        is_far = Less (x, two)
        far_or_zero = Where (is_far, far, zero)
        raw = Where (is_near, near, far_or_zero)""",
}
#: Numbers that the steps use, float64 scalars.
CONSTANTS = {
    **{"zero": 0.0, "half": 0.5, "one": 1.0, "c1_5": 1.5, "two": 2.0, "c2_5": 2.5, "four": 4.0, "five": 5.0},
    **{"eight": 8.0, "minus_half": -0.5, "unit": 2.0**PRECISION_BITS, "largest": 255.0},
}

#: The sizes are those of ``torchvision.transforms``: the longer edge is truncated, half a pixel of the crop is rounded
#: to even. ``pillow.Resample`` resizes the last but one dimension of ``(N, A, S, 3)``, and crops it: the result is
#: ``(N, 3, A, crop)``. ``pillow.Weights`` gives its weights ``(S, crop)``, whole numbers as in
#: :mod:`project.inference.pillow_resize`, and the first and last pixel that each output pixel depends on.
TEXT = """
<ir_version: 10, opset_import: ["": 18, "pillow": 1]>
preprocessing (uint8[N, H, W, 3] images) => (uint8[N, 3, {crop}, {crop}] pixels) {{
    size = Shape <start = 1, end = 3> (images)
    shorter = ReduceMin <keepdims = 1> (size)
    resize = Constant <value = int64[1] {{{resize}}}> ()
    scaled = Mul (size, resize)
    target = {target}
    crop = Constant <value = int64[1] {{{crop}}}> ()
    margin = Sub (target, crop)
    margin_float = Cast <to = 1> (margin)
    half = Constant <value = float {{0.5}}> ()
    start_float = Mul (margin_float, half)
    start_rounded = Round (start_float)
    start = Cast <to = 7> (start_rounded)
    target_height, target_width = Split <num_outputs = 2> (target)
    top, left = Split <num_outputs = 2> (start)
    narrow = pillow.Resample (images, target_width, left)
    turned = Transpose <perm = [0, 3, 2, 1]> (narrow)
    small = pillow.Resample (turned, target_height, top)
    pixels = Transpose <perm = [0, 1, 3, 2]> (small)
}}
<domain: "pillow", opset_import: ["": 18]>
Weights (size, target, start) => (weights, first, last) {{
{constants}
    size_double = Cast <to = 11> (size)
    target_double = Cast <to = 11> (target)
    scale = Div (size_double, target_double)
    stretch = Max (scale, one)
    numbers = Constant <value = int64[{crop}] {{{numbers}}}> ()
    shifted = Add (numbers, start)
    columns = Cast <to = 11> (shifted)
    middles = Add (columns, half)
    centers = Mul (middles, scale)
    support = Constant <value = double {{{support}}}> ()
    reach = Mul (stretch, support)
    low = Sub (centers, reach)
    low_whole = Floor (low)
    low_inside = Max (low_whole, zero)
    first = Cast <to = 7> (low_inside)
    high = Add (centers, reach)
    high_whole = Ceil (high)
    high_inside = Min (high_whole, size_double)
    last = Cast <to = 7> (high_inside)
    limit = Squeeze (size_double)
    positions = Range (zero, limit, one)
    axis = Constant <value = int64[1] {{1}}> ()
    rows = Unsqueeze (positions, axis)
    distances = Sub (rows, centers)
    from_middles = Add (distances, half)
    inverse = Div (one, stretch)
    signed = Mul (from_middles, inverse)
    x = Abs (signed){filter}
    first_axis = Constant <value = int64[1] {{0}}> ()
    sum = ReduceSum <keepdims = 1> (raw, first_axis)
    normal = Div (raw, sum)
    sign = Sign (normal)
    absolute = Abs (normal)
    large = Mul (absolute, unit)
    plus_half = Add (large, half)
    whole = Floor (plus_half)
    weights = Mul (whole, sign)
}}
<domain: "pillow", opset_import: ["": 18, "pillow": 1]>
Resample (images, target, start) => (resized) {{
{constants}
    size = Shape <start = 2, end = 3> (images)
    weights, first, last = pillow.Weights (size, target, start)
    row_axis = Constant <value = int64[1] {{0}}> ()
    pixel_axis = Constant <value = int64[1] {{2}}> ()
    lengths = Constant <value = int64[{parts}] {{{lengths}}}> ()
    {part_weights} = Split <axis = 1> (weights, lengths){blocks}
    sums = Concat <axis = 3> ({part_sums})
    fractions = Div (sums, unit)
    plus_half = Add (fractions, half)
    whole = Floor (plus_half)
    clipped = Clip (whole, zero, largest)
    resized = Cast <to = 2> (clipped)
}}
"""
BLOCK = """
    begin{i} = Constant <value = int64[1] {{{begin}}}> ()
    final{i} = Constant <value = int64[1] {{{final}}}> ()
    from{i} = Gather (first, begin{i})
    until{i} = Gather (last, final{i})
    used_weights{i} = Slice (weights{i}, from{i}, until{i}, row_axis)
    used{i} = Slice (images, from{i}, until{i}, pixel_axis)
    channels{i} = Transpose <perm = [0, 3, 1, 2]> (used{i})
    doubles{i} = Cast <to = 11> (channels{i})
    sums{i} = MatMul (doubles{i}, used_weights{i})"""


def preprocessing_graph(preprocessing: Preprocessing) -> Any:
    """The graph from images ``(N, H, W, 3)`` to the input of the network ``(N, 3, crop, crop)``, both uint8.

    The pixels equal those of :func:`project.data.transforms.evaluation`.

    Args:
        preprocessing: Preprocessing of the weights.

    Returns:
        An ``onnx.ModelProto`` with dynamic N, H and W.

    Raises:
        ConfigError: The file cannot resize with the interpolation of the weights.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    require_filter(preprocessing)
    crop = preprocessing.crop
    lengths = parts_of(crop, PARTS)
    both = f"Constant <value = int64[2] {{{preprocessing.resize}, {preprocessing.resize}}}> ()"
    text = TEXT.format(
        crop=crop,
        resize=preprocessing.resize,
        target=both if preprocessing.squash else "Div (scaled, shorter)",
        constants="\n".join(
            f"    {name} = Constant <value = double {{{value!r}}}> ()" for name, value in CONSTANTS.items()
        ),
        numbers=_joined(range(crop)),
        support=float(SUPPORT[preprocessing.interpolation]),
        filter=FILTERS[preprocessing.interpolation],
        parts=len(lengths),
        lengths=_joined(lengths),
        part_weights=_joined(f"weights{i}" for i in range(len(lengths))),
        part_sums=_joined(f"sums{i}" for i in range(len(lengths))),
        blocks="".join(
            BLOCK.format(i=i, begin=begin, final=end - 1)
            for i, (begin, end) in enumerate(pairwise(accumulate(lengths, initial=0)))
        ),
    )
    model = inline_local_functions(onnx.parser.parse_model(text))
    del model.opset_import[1:]  # that of the functions
    _remove_unused_constants(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def _remove_unused_constants(graph: Any) -> None:
    """Remove constants that no node uses: ONNX Runtime would print a warning for each."""
    used = {name for node in graph.node for name in node.input}
    kept = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)


def _joined(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
