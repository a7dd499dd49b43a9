"""Export to ONNX with int8 arithmetic, and what it costs in accuracy and gains in speed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from project.evaluation.confidence_intervals import Interval
from project.evaluation.paired_intervals import newcombe_paired
from project.features.onnx_export import quantize
from project.inference.export_formats import (
    OnnxFormat,
    Runner,
    example_pixels,
    onnx_model,
    save_onnx,
    with_preprocessing,
)
from project.inference.exported_network import ExportedNetwork
from project.preprocessing import Preprocessing
from project.runtime.atomic_write import TEMPORARY_PREFIX
from project.task import Task

#: Training images that determine the ranges of the activations.
CALIBRATION_IMAGES = 128


class Int8Cost(NamedTuple):
    """Comparison of the int8 file with the same graph in float32, on the same images.

    Attributes:
        images: Number of images.
        accuracy: Accuracy in float32.
        int8_accuracy: Accuracy in int8.
        interval: 95 % interval of the difference int8 minus float32.
        speedup: Time in float32 divided by the time in int8, one image at a time, preprocessing included.
    """

    images: int
    accuracy: float
    int8_accuracy: float
    interval: Interval
    speedup: float

    def __str__(self) -> str:
        low, high = (100 * limit for limit in self.interval)
        gain = 100 * (self.int8_accuracy - self.accuracy)
        return (
            f"on {self.images} images, accuracy {self.int8_accuracy:.4f} in int8 and {self.accuracy:.4f} in float32: "
            f"{gain:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, paired); {self.speedup:.1f} x as fast"
        )


def write_int8(
    network: ExportedNetwork,
    preprocessing: Preprocessing,
    metadata: Mapping[str, Any],
    calibration: torch.Tensor,
    labelled: Sequence[tuple[Image.Image, int]],
    task: Task,
    file: Path,
) -> Int8Cost:
    """Write an int8 file, and compare it with float32.

    Args:
        network: The network.
        preprocessing: Preprocessing that the file contains.
        metadata: Plain values that the file contains.
        calibration: Preprocessed training images, uint8 ``(N, 3, S, S)``.
        labelled: Images to compare on, with their class indices; not those of the calibration.
        task: Decodes the probabilities.
        file: File to write.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=file.parent) as folder:
        plain, quantized, reference = (Path(folder, f"{name}.onnx") for name in ("plain", "quantized", "reference"))
        model = onnx_model(network, example_pixels(preprocessing), "pixels", network.outputs)
        onnx.save(model, plain)
        quantize(plain, calibration, quantized)
        save_onnx(with_preprocessing(model, preprocessing), metadata, reference)
        save_onnx(with_preprocessing(onnx.load(quantized), preprocessing), metadata, file)
        load = OnnxFormat().runner
        return int8_cost(load([reference]), load([file]), labelled, task)


def int8_cost(
    reference: Runner, quantized: Runner, labelled: Sequence[tuple[Image.Image, int]], task: Task
) -> Int8Cost:
    """Run both files on the same images, alternating.

    Args:
        reference: Runs the float32 file.
        quantized: Runs the int8 file.
        labelled: Images and their class indices, at least one.
        task: Decodes the probabilities.
    """
    seconds, correct = [0.0, 0.0], np.zeros((2, len(labelled)), bool)
    for position, (image, label) in enumerate(labelled):
        pixels = np.array(image)[None]
        for side, run in enumerate((reference, quantized)):
            start = time.perf_counter()
            probabilities = run(pixels)["probabilities"]
            seconds[side] += time.perf_counter() - start
            correct[side, position] = int(task.predict(torch.from_numpy(probabilities)).label[0]) == label
    accuracies = correct.mean(1)
    interval = newcombe_paired(correct[1], correct[0])
    return Int8Cost(len(labelled), float(accuracies[0]), float(accuracies[1]), interval, seconds[0] / seconds[1])
