"""(a) Frozen features per second, from photographs on disk, against the limits of the card and of the decoder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from project.data.sources.base import Source
from project.data.sources.folder import Folder
from project.data.transforms import evaluation
from project.features.engine_options import EngineFactory
from project.features.engine_selection import measure
from project.features.engines import DTYPES, Engine
from project.features.extraction import extract
from project.features.frozen_prefix import FrozenPrefix
from project.features.store import Space
from project.features.views import Views, digest_images, image_views, load_image
from project.models.backbone import Backbone, load_backbone
from project.runtime.distributed import ProcessGroup
from project.runtime.system import cores
from tests.benchmarks.gpu.busy import Busy, measure_busy
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.photographs import repeat
from tests.benchmarks.gpu.scale import Scale

ENGINES = ("torch fp32", "torch bf16", "torch fp16")
COMPILED = ("compile bf16",)
SHARE = 0.8  # of the synthetic rate: what extraction reaches unless decoding is the limit
DECODING = 0.95  # of the rate of decoding alone: what it reaches where decoding is the limit
ALL_CORES = 0.85  # share of all cores that is in use then


@dataclass(frozen=True)
class Measured:
    """One network and the images that it gets.

    Attributes:
        backbone: The network, frozen whole, on the device.
        images: Images whose rows are computed.
        source: Reads them.
        decoding: Images per second that all cores decode for it.
    """

    backbone: Backbone
    images: Views
    source: Source
    decoding: float

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 3, H, W)`` on the device to rows, as a live fit runs the network."""
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def some(self, count: int = 32) -> torch.Tensor:
        """A few decoded images, uint8 ``(B, 3, H, W)``."""
        return torch.stack([load_image(self.source, image) for image in self.images[:count]])


def extraction(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure decoding alone, then each network and engine: synthetic rate, real rate, and what limits it."""
    source = Folder(str(repeat(photographs, work / "photographs", scale.images, 1)))
    samples = source.splits["train"]
    digests = digest_images(source, samples, ProcessGroup())
    decoding: dict[int, float] = {}
    networks: list[Measured] = []
    for name, size in scale.networks.items():
        backbone = load_backbone(name, None, image_size=size).eval().to(scale.device)
        with out.attempt(f"{name}, plain PyTorch"):
            _plain(scale, backbone, out)
        (images,) = image_views(source, samples, digests, evaluation(backbone.preprocessing), [""])
        if size not in decoding:
            decoding[size] = _decoding(scale, source, images, out, size)
        networks.append(Measured(backbone, images, source, decoding[size]))
    kinds = [each for each in ENGINES if scale.device.type != "cpu" or "fp16" not in each]
    for kind in [*kinds, *(COMPILED if scale.compiles else ())]:
        for network in networks:
            with out.attempt(f"{network.backbone.name} {kind}"):
                _extract(scale, network, kind, work / "rows", out)


def _extract(scale: Scale, network: Measured, kind: str, folder: Path, out: FigureFile) -> None:
    """Measure one engine of one network."""
    engine_name, precision = kind.split()
    backbone, name = network.backbone, f"{network.backbone.name} {kind}"
    layout = "channels_last"
    engines = EngineFactory(folder, backbone, backbone.cut, network.encode, scale.device, "", network.some, layout)
    (option,) = engines.options(engine_name, precision, "32-true")  # type: ignore[arg-type]
    began = time.perf_counter()
    engine = option.build()
    measure(engine, network.some())
    built = time.perf_counter() - began
    synthetic = _synthetic(scale, backbone, engine, engine_name, precision, network.some())
    count = min(len(network.images), max(int(synthetic * 2 * scale.seconds), 8 * engine.batch_size))
    rate, busy = _steady_rate(scale, engine, network.images[:count], network.source, option.space)
    shutil.rmtree(folder)
    which = "the card" if synthetic < network.decoding else "decoding"
    note = (
        f"{count} photographs in {busy.seconds:.1f} s, batches of {engine.batch_size}, {built:.1f} s to build; {busy}"
    )
    out.add(f"{name}, synthetic", synthetic, "images/s", "uint8 tensors that lie on the device")
    out.add(f"{name}, from photographs", rate, "images/s", note)
    out.add(f"{name}, share of synthetic", rate / synthetic, "", f"the lower limit is {which}")
    if scale.device.type == "cuda":
        all_cores = which == "decoding" and rate >= DECODING * network.decoding and (busy.cpu or 0) >= ALL_CORES
        reached = rate >= SHARE * synthetic or all_cores
        out.promise(f"{name}: {SHARE:.0%} of synthetic, or decoding is the limit", reached, str(busy))


def _decoding(scale: Scale, source: Source, images: Views, out: FigureFile, size: int) -> float:
    """Images per second that all cores read, decode and transform as extraction does, while nothing is computed."""
    discard = _Discard(scale.device)
    count = min(len(images), scale.images)
    rate, busy = _steady_rate(scale, discard, images[:count], source, cast(Space, discard))
    free = shutil.disk_usage("/dev/shm").free / 2**30
    note = f"{count} photographs, {cores()} cores, {free:.1f} GiB of shared memory; {busy}"
    out.add(f"decoding alone at {size} px", rate, "images/s", note)
    return rate


def _steady_rate(scale: Scale, engine: Engine, images: Views, source: Source, space: Space) -> tuple[float, Busy]:
    """Images per second from the first batch to the last: starting the processes that decode is left out."""
    counts: list[int] = []
    with measure_busy(scale.device) as busy:

        def done(count: int) -> None:
            counts.append(count)
            busy.restart() if len(counts) == 1 and count < len(images) else busy.mark()

        extract(engine, images, source, space, done=done)
    return sum(counts[1:] or counts) / busy.seconds, busy


class _Discard:
    """An engine that computes nothing, and a space that keeps nothing: what is left is decoding."""

    side_by_side = False
    grows = False
    batch_size = 128

    def __init__(self, device: torch.device) -> None:
        self.ahead = 3 if device.type != "cpu" else 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """One number an image."""
        return torch.zeros(len(images), 1)

    def write(self, keys: object, rows: torch.Tensor) -> None:
        """Keep nothing."""


@torch.inference_mode()
def _plain(scale: Scale, backbone: Backbone, out: FigureFile) -> None:
    """The backbone itself, eager, without an engine: what plain PyTorch reaches."""
    size = backbone.preprocessing.crop
    images = torch.randint(
        0, 256, (64 if scale.device.type == "cuda" else 16, 3, size, size), dtype=torch.uint8, device=scale.device
    )
    for layout, text in ((torch.contiguous_format, "contiguous"), (torch.channels_last, "channels_last")):
        backbone.to(memory_format=layout)  # type: ignore[call-overload]
        for dtype in (torch.float32, torch.bfloat16):
            batch = images.contiguous(memory_format=layout)
            with torch.autocast(scale.device.type, dtype, enabled=dtype != torch.float32):
                rate = _rate(scale, lambda batch=batch: backbone(batch), len(batch))
            autocast = "fp32" if dtype == torch.float32 else "bf16 autocast"
            out.add(
                f"{backbone.name} plain PyTorch, {autocast}, {text}", rate, "images/s", "tensors that lie on the device"
            )


def _synthetic(scale: Scale, backbone: Backbone, engine: Engine, name: str, precision: str, few: torch.Tensor) -> float:
    """Images per second of an engine's network on images that lie on the card, in its own batches."""
    size = engine.batch_size
    batch = few.repeat(-(-size // len(few)), 1, 1, 1)[:size].to(scale.device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    run: Callable[[torch.Tensor], torch.Tensor] = backbone
    if (name, precision) != ("torch", "fp32"):
        run = FrozenPrefix(backbone, backbone.cut, DTYPES[precision]).to(scale.device)
    if name == "compile":
        run = torch.compile(run, dynamic=False)
    with torch.no_grad():
        return _rate(scale, lambda: run(batch), size)


def _rate(scale: Scale, call: Callable[[], object], size: int) -> float:
    """Images per second of a call, the device's queue drained before and after."""

    def wait() -> None:
        if scale.device.type == "cuda":
            torch.cuda.synchronize(scale.device)

    for _ in range(3):
        call()
    wait()
    began, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < scale.seconds:
        for _ in range(4):
            call()
        wait()
        calls += 4
    return calls * size / (time.perf_counter() - began)
