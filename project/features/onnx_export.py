"""ONNX files of a frozen prefix: export, and quantization to int8."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from project.features.engines import suppress_output
from project.features.frozen_prefix import FrozenPrefix
from project.runtime.atomic_write import atomic_write

QUANTIZED_OPERATORS = ["Conv", "Relu", "Clip", "Add", "Mul", "MaxPool", "Concat", "HardSwish", "HardSigmoid"]


def export(prefix: FrozenPrefix, size: int, target: Path) -> None:
    """Export a prefix to ONNX.

    Args:
        prefix: Prefix in float32.
        size: Height and width of the images in pixels.
        target: File to write atomically. Its graph takes uint8 ``(B, 3, size, size)`` with dynamic B.
    """
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with suppress_output():
        program = torch.onnx.export(
            prefix,
            (example,),
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    with atomic_write(target) as temporary:
        program.save(temporary)


def quantize(source: Path, images: torch.Tensor, target: Path) -> None:
    """Quantize an ONNX file to int8: static, weights per channel, activation ranges calibrated on images.

    Convolutions and the operators between them are quantized. Pooling and later operators stay in float32, so that
    rows keep full resolution.

    Args:
        source: File written by :func:`export`.
        images: Calibration images, uint8 ``(N, 3, H, W)``.
        target: File to write atomically.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self, name: str) -> None:
            self._batches = iter([{name: batch.numpy()} for batch in torch.split(images, 8)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    with suppress_output(), atomic_write(target) as temporary, tempfile.TemporaryDirectory() as folder:
        import onnx

        simplified = Path(folder) / "simplified.onnx"
        quant_pre_process(str(source), str(simplified), skip_symbolic_shape=True)
        graph = onnx.load(simplified).graph
        quantization.quantize_static(
            str(simplified),
            str(temporary),
            Reader(graph.input[0].name),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED_OPERATORS,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            extra_options={"CalibMovingAverage": True},  # limits the effect of outliers on the range
        )
