"""Inference engines: compute the rows of a frozen prefix with PyTorch, torch.compile or ONNX Runtime.

An engine maps uint8 images ``(B, 3, H, W)`` to rows at the cut. On a CPU, most engines use one thread per call, and
one call runs per core: no core waits for the slowest of several threads, and some calls decode images while others
compute, without using more threads than cores.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from project.errors import EngineError
from project.features.frozen_prefix import FrozenPrefix

EngineName = Literal["torch", "compile", "onnxruntime"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Batch sizes. On a CPU, batches whose activations fit into the cache are fastest.
SINGLE_THREAD_BATCH = 8
BATCH = 32  # on a GPU, the initial value: the best one is measured
COMPILED_GPU_BATCH = 128  # fixed: every other size would be compiled separately
#: Batches to decode while a GPU computes.
PREFETCH_BATCHES = 3


class Engine(Protocol):
    """Computes rows at the cut.

    Attributes:
        single_threaded: Each call uses one thread, so several threads may call the engine concurrently.
        batch_size: Images per call.
        tunes_batch_size: Larger batches may be faster, as on a GPU, so ``batch_size`` may be increased.
        prefetch: Number of batches to decode while one is computed; 0 if both compete for the same cores.
    """

    single_threaded: bool
    batch_size: int
    tunes_batch_size: bool
    prefetch: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images ``(B, 3, H, W)``, on the CPU, to rows on the CPU."""


class ExactEngine:
    """The backbone itself in full precision: rows are bit-identical to those of a live fit.

    Args:
        encode: Maps images ``(B, 3, H, W)`` on the device to rows.
        device: Device of the backbone.
    """

    single_threaded = False
    batch_size = BATCH

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        self.tunes_batch_size = device.type != "cpu"
        self.prefetch = PREFETCH_BATCHES if self.tunes_batch_size else 0
        self._encode = encode
        self._device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of images. A partial batch is padded: oneDNN sums small batches in a different order."""
        count = len(images)
        batch = images
        if count < self.batch_size:
            batch = images.repeat(-(-self.batch_size // count), 1, 1, 1)[: self.batch_size]
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # a compiled backbone differs in bits
            return self._encode(batch.to(self._device, non_blocking=True))[:count].cpu()


class TorchEngine:
    """A folded copy of the prefix in channels_last, optionally compiled; one thread per call on a CPU.

    Args:
        prefix: The copy.
        device: Device to run on.
        compiled: Whether to use ``torch.compile``, with inductor's freezing on a CPU.
    """

    def __init__(self, prefix: FrozenPrefix, device: torch.device, compiled: bool) -> None:
        self.single_threaded = device.type == "cpu"
        self.batch_size = SINGLE_THREAD_BATCH if self.single_threaded else COMPILED_GPU_BATCH if compiled else BATCH
        self.tunes_batch_size = not self.single_threaded and not compiled
        self.prefetch = 0 if self.single_threaded else PREFETCH_BATCHES
        self._device = device
        self._prefix = prefix.to(device)
        self._compiled = compiled
        self._run: Callable[[torch.Tensor], torch.Tensor] | None = None if compiled else self._prefix
        self._lock = threading.Lock()

    def _compile(self, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Compile for full batches; concurrent callers wait."""
        import torch._inductor.config as inductor

        with self._lock:
            if self._run is None:
                run = torch.compile(self._prefix, dynamic=False)
                options: dict[str, Any] = {"freezing": True, "cpp.threads": 1} if self.single_threaded else {}
                try:
                    with suppress_output(), inductor.patch(options):
                        run(images)
                except Exception as error:  # anything: inductor, or a missing compiler
                    reason = str(error).strip().partition("\n")[0][:150]
                    raise EngineError(
                        f"features.engine: torch.compile failed: {reason}. Use another engine, such as torch, or auto."
                    ) from error
                self._run = run
            return self._run

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of images. A compiled engine pads partial batches, since each size would be compiled separately."""
        count = len(images)
        if self._compiled and count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        # no_grad rather than inference_mode, under which inductor does not freeze
        with torch.no_grad():
            if self._device.type == "cuda" and not images.is_pinned():
                images = images.pin_memory()
            images = images.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            run = self._compile(images) if self._run is None else self._run
            rows = run(images)
        return rows[:count].cpu()


class OnnxEngine:
    """ONNX Runtime on the CPU, one thread per call.

    Args:
        path: ONNX file written by ``project.features.onnx_export``.
    """

    single_threaded = True
    batch_size = SINGLE_THREAD_BATCH
    tunes_batch_size = False
    prefetch = 0

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of images, float32."""
        (rows,) = self._session.run(None, {self._input: images.numpy()})
        return torch.from_numpy(rows)


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Silence logs, warnings and prints of exporters and compilers; their errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
