"""A frozen prefix as an ONNX file: exported once a network, and quantised to int8 where that is asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from project.features.engines import quiet
from project.features.frozen_prefix import FrozenPrefix
from project.runtime.atomic_write import replacing


def export(prefix: FrozenPrefix, size: int, target: Path) -> None:
    """Write a prefix as an ONNX file.

    Args:
        prefix: In float32.
        size: Side of its images in pixels.
        target: The file, which appears whole or not at all. Its graph takes uint8 ``(B, 3, size, size)``, any B.
    """
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with quiet():
        program = torch.onnx.export(
            prefix,
            (example,),
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    with replacing(target) as temporary:
        program.save(temporary)


def quantize(source: Path, images: torch.Tensor, target: Path) -> None:
    """Quantise a network to int8: static, weights a channel each, activations as the images have them.

    Convolutions and what lies between them are quantised; pooling and what follows stay in float32, so that rows keep
    their full resolution.

    Args:
        source: What :func:`export` wrote.
        images: uint8 ``(N, 3, H, W)`` to calibrate on.
        target: The file, which appears whole or not at all.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self, name: str) -> None:
            self._batches = iter([{name: batch.numpy()} for batch in torch.split(images, 8)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    with quiet(), replacing(target) as temporary, tempfile.TemporaryDirectory() as folder:
        import onnx

        simplified = Path(folder) / "simplified.onnx"
        quant_pre_process(str(source), str(simplified), skip_symbolic_shape=True)
        graph = onnx.load(simplified).graph
        quantization.quantize_static(
            str(simplified),
            str(temporary),
            Reader(graph.input[0].name),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=[
                "Conv",
                "Relu",
                "Clip",
                "Add",
                "Mul",
                "MaxPool",
                "Concat",
                "HardSwish",
                "HardSigmoid",
            ],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            extra_options={"CalibMovingAverage": True},  # one outlier does not stretch the range of all
        )
