"""File formats of an exported classifier: ONNX and torch.export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from project.features.engines import suppress_output
from project.inference.exported_network import ExportedNetwork, WithPreprocessing
from project.inference.preprocessing_graph import preprocessing_graph
from project.preprocessing import Preprocessing

#: Maps images, uint8 ``(N, H, W, 3)``, to the outputs of a file by name.
Runner = Callable[[np.ndarray], dict[str, np.ndarray]]
OPSET = 18
#: Range of image sizes in a torch.export program, in pixels.
MIN_SIDE, MAX_SIDE = 1, 1 << 15
#: Metadata that does not depend on the task.
SHARED_METADATA = ("preprocessing", "backbone", "versions")


class ExportFormat(Protocol):
    """Writes and runs one kind of file, or several files together.

    Attributes:
        requirement: Package that runs the files, and the extra that installs it; ``None`` for torch.
    """

    requirement: tuple[str, str] | None

    def files(self, output: Path) -> list[Path]:
        """The files of an output."""

    def write(
        self, network: ExportedNetwork, preprocessing: Preprocessing, metadata: Mapping[str, Any], files: Sequence[Path]
    ) -> None:
        """Write files that map images of any size to the outputs of the network.

        Args:
            network: The network.
            preprocessing: Preprocessing that the files contain.
            metadata: Plain values that the files contain.
            files: Files to write, in the order of :meth:`files`.

        Raises:
            ConfigError: The format has no operator for the interpolation.
        """

    def runner(self, files: Sequence[Path]) -> Runner:
        """Load the files into their own runtime."""


class OnnxFormat:
    """ONNX, for ONNX Runtime: one graph with the preprocessing."""

    requirement: tuple[str, str] | None = ("onnxruntime", "onnx")

    def files(self, output: Path) -> list[Path]:
        """The output itself."""
        return [output]

    def write(
        self, network: ExportedNetwork, preprocessing: Preprocessing, metadata: Mapping[str, Any], files: Sequence[Path]
    ) -> None:
        """Write the graph from ``images`` to the outputs."""
        model = onnx_model(network, example_pixels(preprocessing), "pixels", network.outputs)
        save_onnx(with_preprocessing(model, preprocessing), metadata, files[0])

    def runner(self, files: Sequence[Path]) -> Runner:
        """A session of ONNX Runtime on the CPU."""
        session = onnx_session(files[0])
        return lambda images: run_session(session, {"images": images})


class SplitOnnxFormat(OnnxFormat):
    """Two ONNX files: the frozen stages, which the classifiers of several tasks share, and the rest."""

    def files(self, output: Path) -> list[Path]:
        """``NAME.backbone.onnx`` and ``NAME.head.onnx``."""
        return [output.with_suffix(f".{part}.onnx") for part in ("backbone", "head")]

    def write(
        self, network: ExportedNetwork, preprocessing: Preprocessing, metadata: Mapping[str, Any], files: Sequence[Path]
    ) -> None:
        """Write the graphs from ``images`` to ``rows``, and from ``rows`` to the outputs."""
        pixels = example_pixels(preprocessing)
        with torch.no_grad():
            rows = network.prefix(pixels)
        prefix = with_preprocessing(onnx_model(network.prefix, pixels, "pixels", ("rows",)), preprocessing)
        shared = {key: value for key, value in metadata.items() if key in SHARED_METADATA}
        save_onnx(prefix, shared, files[0])
        save_onnx(onnx_model(network.suffix, rows, "rows", network.outputs), metadata, files[1])

    def runner(self, files: Sequence[Path]) -> Runner:
        """Two sessions of ONNX Runtime on the CPU."""
        prefix, suffix = map(onnx_session, files)

        return lambda images: run_session(suffix, run_session(prefix, {"images": images}))


class ProgramFormat:
    """A program of ``torch.export``, for PyTorch without this project."""

    requirement: tuple[str, str] | None = None

    def files(self, output: Path) -> list[Path]:
        """The output itself."""
        return [output]

    def write(
        self, network: ExportedNetwork, preprocessing: Preprocessing, metadata: Mapping[str, Any], files: Sequence[Path]
    ) -> None:
        """Write the program; the metadata is its extra file ``metadata.json``."""
        sides = [torch.export.Dim(name, min=MIN_SIDE, max=MAX_SIDE) for name in ("H", "W")]
        images = torch.zeros(2, preprocessing.resize + 1, preprocessing.resize + 3, 3, dtype=torch.uint8)
        with suppress_output(), torch.no_grad():
            program = torch.export.export(
                WithPreprocessing(network, preprocessing).eval(),
                (images,),
                dynamic_shapes=({0: torch.export.Dim("N"), 1: sides[0], 2: sides[1]},),
            )
        torch.export.save(program, files[0], extra_files={"metadata.json": json.dumps(dict(metadata))})

    def runner(self, files: Sequence[Path]) -> Runner:
        """The loaded program."""
        module = torch.export.load(files[0]).module()

        def run(images: np.ndarray) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {name: np.asarray(output) for name, output in module(torch.from_numpy(images)).items()}

        return run


def example_pixels(preprocessing: Preprocessing) -> torch.Tensor:
    """An input of the network: two images, uint8 ``(2, 3, S, S)``."""
    return torch.zeros(2, 3, preprocessing.crop, preprocessing.crop, dtype=torch.uint8)


def onnx_model(network: nn.Module, example: torch.Tensor, input_name: str, output_names: Sequence[str]) -> Any:
    """Export a module as an ``onnx.ModelProto`` with a dynamic batch size.

    Args:
        network: Takes one tensor.
        example: Its input, of two or more items.
        input_name: Name of the input.
        output_names: Names of the outputs.
    """
    with suppress_output():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            input_names=[input_name],
            output_names=[*output_names],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def with_preprocessing(model: Any, preprocessing: Preprocessing) -> Any:
    """Put the preprocessing before a model that takes ``pixels``."""
    import onnx

    graph = preprocessing_graph(preprocessing)
    graph.ir_version = model.ir_version
    return onnx.compose.merge_models(graph, model, io_map=[("pixels", "pixels")])


def save_onnx(model: Any, metadata: Mapping[str, Any], file: Path) -> None:
    """Write a model with metadata, and without the stack traces that name paths of this machine."""
    import onnx

    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, file)


def onnx_session(file: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of an ONNX Runtime session by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(np.asarray, session.run(names, dict(inputs))), strict=True))


#: Formats by the suffix of the output.
FORMATS: Mapping[str, ExportFormat] = {".onnx": OnnxFormat(), ".pt2": ProgramFormat()}
