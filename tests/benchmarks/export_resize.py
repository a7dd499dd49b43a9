"""Time of the preprocessing in exported files, relative to Pillow, on noise of the size of photographs.

    python -m tests.benchmarks.export_resize

The three alternate, with the same number of threads. Their pixels are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from PIL import Image

from project.data.transforms import evaluation
from project.inference.exported_network import WithPreprocessing
from project.inference.preprocessing_graph import preprocessing_graph
from project.preprocessing import Preprocessing
from tests.benchmarks.measure import print_table

SIZES = ((375, 500), (750, 1000), (3000, 4000))  # height, width
FILTERS = ("bilinear", "bicubic")


def contestants(preprocessing: Preprocessing, threads: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Functions from pixels ``(1, H, W, 3)`` to the input of the network ``(3, S, S)``, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow torch down
    session = onnxruntime.InferenceSession(preprocessing_graph(preprocessing).SerializeToString(), options)
    transform, program = evaluation(preprocessing), WithPreprocessing(torch.nn.Identity(), preprocessing)
    return {
        "Pillow": lambda pixels: transform(Image.fromarray(pixels[0])).numpy(),
        "ONNX": lambda pixels: np.asarray(session.run(None, {"images": pixels})[0][0]),
        "torch": lambda pixels: np.asarray(program(torch.from_numpy(pixels))[0]),
    }


def main() -> None:
    """Print one row per filter, size and implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, rows = np.random.default_rng(0), []
    for interpolation in FILTERS:
        functions = contestants(Preprocessing(256, 224, interpolation, (0.5,) * 3, (0.5,) * 3), options.threads)
        for height, width in SIZES:
            pixels = generator.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
            expected = functions["Pillow"](pixels)
            different = {name: int((run(pixels) != expected).sum()) for name, run in functions.items()}
            seconds: dict[str, list[float]] = {name: [] for name in functions}
            for _ in range(options.rounds):
                for name, run in functions.items():
                    start = time.perf_counter()
                    run(pixels)
                    seconds[name].append(time.perf_counter() - start)
            best = {name: min(values) for name, values in seconds.items()}
            for name, value in best.items():
                row = [interpolation, f"{width} x {height}", name, f"{1e3 * value:.0f}"]
                rows.append([*row, f"{value / best['Pillow']:.1f}", str(different[name])])
    print_table(["filter", "photograph", "resize", "ms", "ratio to Pillow", "pixels that differ"], rows)


if __name__ == "__main__":
    main()
