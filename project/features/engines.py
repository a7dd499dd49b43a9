"""The fast inference copy of a frozen prefix: the same rows, computed by the engine that a machine is best at.

An engine takes uint8 images ``(B, 3, H, W)`` and gives rows at the cut. On a CPU the fast ones compute on one thread a
call, and as many calls run side by side as there are cores: nothing waits for the slowest of several threads, and one
call's images are decoded while another computes, without more threads than cores.
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
#: Images a call. On a CPU a batch whose activations fit the cache is the fastest; a GPU's is found by measurement.
LANE_BATCH = 8
BATCH = 32
#: On a GPU, of a network that would be compiled anew for each size that is tried.
COMPILED_BATCH = 128
#: Batches that are decoded while a GPU computes.
AHEAD = 3


class Engine(Protocol):
    """Computes rows at the cut.

    Attributes:
        side_by_side: A call uses one thread, and calls are made from several threads at once.
        batch_size: Images a call.
        grows: Larger batches may be faster, as on a GPU: ``batch_size`` can be set.
        ahead: Batches that are worth decoding while one is computed: none where both need the same cores.
    """

    side_by_side: bool
    batch_size: int
    grows: bool
    ahead: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images ``(B, 3, H, W)``, on the CPU, to rows on the CPU."""


class ExactEngine:
    """The network itself, as a live fit in full precision runs it: its rows are the same to the bit.

    Args:
        encode: Images ``(B, 3, H, W)`` on the device to rows.
        device: Where the network is.
    """

    side_by_side = False
    batch_size = BATCH

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        self.grows = device.type != "cpu"
        self.ahead = AHEAD if self.grows else 0
        self._encode = encode
        self._device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of images. A batch is filled up: in a small one, oneDNN sums in another order."""
        count = len(images)
        whole = images
        if count < self.batch_size:
            whole = images.repeat(-(-self.batch_size // count), 1, 1, 1)[: self.batch_size]
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # compiled, it would not be the network
            return self._encode(whole.to(self._device, non_blocking=True))[:count].cpu()


class TorchEngine:
    """A folded copy in channels_last, compiled or not; on a CPU one thread a call.

    Args:
        prefix: The copy.
        device: Where it runs.
        compiled: Whether to run it through ``torch.compile``; on a CPU with inductor's freezing.
    """

    def __init__(self, prefix: FrozenPrefix, device: torch.device, compiled: bool) -> None:
        self.side_by_side = device.type == "cpu"
        self.batch_size = LANE_BATCH if self.side_by_side else COMPILED_BATCH if compiled else BATCH
        self.grows = not self.side_by_side and not compiled
        self.ahead = 0 if self.side_by_side else AHEAD
        self._device = device
        self._run: Callable[[torch.Tensor], torch.Tensor] = prefix.to(device)
        self._compiling = threading.Lock()
        self._compiled = False
        if compiled:
            self._prefix = self._run
            self._run = self._first_call

    def _first_call(self, images: torch.Tensor) -> torch.Tensor:
        """Compile for whole batches; other threads wait."""
        import torch._inductor.config as inductor

        with self._compiling:
            if not self._compiled:
                run = torch.compile(self._prefix, dynamic=False)
                options: dict[str, Any] = {"freezing": True, "cpp.threads": 1} if self.side_by_side else {}
                try:
                    with quiet(), inductor.patch(options):
                        run(images)
                except Exception as error:  # whatever the compiler, or the lack of one, raises
                    why = str(error).strip().partition("\n")[0][:150]
                    raise EngineError(
                        f"features.engine: torch.compile fails here: {why}. Use another engine, such as torch, or auto."
                    ) from error
                self._run = run
                self._compiled = True
        return self._run(images)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Rows of images. A batch that is not full is filled up where each size would be compiled anew."""
        count = len(images)
        if hasattr(self, "_prefix") and count < self.batch_size:
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        # no_grad rather than inference_mode: inductor freezes under it alone
        with torch.no_grad():
            if self._device.type == "cuda" and not images.is_pinned():
                images = images.pin_memory()
            images = images.to(self._device, non_blocking=True)
            rows = self._run(images.contiguous(memory_format=torch.channels_last))
        return rows[:count].cpu()


class OnnxEngine:
    """ONNX Runtime on the CPU, one thread a call.

    Args:
        path: The network, as ``project.features.onnx_export`` writes it.
    """

    side_by_side = True
    batch_size = LANE_BATCH
    grows = False
    ahead = 0

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
def quiet() -> Iterator[None]:
    """Exporters and compilers say much that is nothing to the user; their errors are exceptions all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
