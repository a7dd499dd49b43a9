"""Extraction throughput from photographs on disk, against the limits of the GPU and of decoding."""

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
from project.features.frozen_prefix import FrozenPrefix, PrefixSpec
from project.features.store import Space
from project.features.views import Views, digest_images, image_views, load_image
from project.models.backbone import Backbone
from project.models.loading import load_backbone
from project.runtime.distributed import ProcessGroup
from project.runtime.system import cores
from tests.benchmarks.gpu.figures import FigureFile
from tests.benchmarks.gpu.photographs import repeat
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.gpu.utilization import Utilization, measure_utilization

ENGINES = ("torch fp32", "torch bf16", "torch fp16")
COMPILED = ("compile bf16",)
#: Minimum share of the synthetic rate, unless decoding is the bottleneck.
MIN_SYNTHETIC_SHARE = 0.8
#: Minimum share of the decoding rate where decoding is the bottleneck. Decoding alone does not use all cores fully
#: either: on 16 cores, it measures a CPU utilization of 84 %.
MIN_DECODING_SHARE = 0.95


@dataclass(frozen=True)
class Workload:
    """One network and its images.

    Attributes:
        backbone: The fully frozen network on the device.
        images: Images whose rows are computed.
        source: Source of the images.
        decoding: Images per second that all cores decode for this network.
    """

    backbone: Backbone
    images: Views
    source: Source
    decoding: float

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images ``(B, 3, H, W)`` on the device as a live fit does."""
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def first_images(self, count: int = 32) -> torch.Tensor:
        """The first images, decoded, uint8 ``(B, 3, H, W)``."""
        return torch.stack([load_image(self.source, image) for image in self.images[:count]])


def extraction(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
    """Measure decoding alone, then the synthetic rate, real rate and bottleneck of each network and engine."""
    source = Folder(str(repeat(photographs, work / "photographs", scale.images, 1)))
    samples = source.splits["train"]
    digests = digest_images(source, samples, ProcessGroup())
    decoding: dict[int, float] = {}
    workloads: list[Workload] = []
    for name, size in scale.networks.items():
        backbone = load_backbone(name, None, image_size=size).eval().to(scale.device)
        with out.record_failure(f"{name}, plain PyTorch"):
            _measure_plain(scale, backbone, out)
        (images,) = image_views(source, samples, digests, evaluation(backbone.preprocessing), [""])
        if size not in decoding:
            decoding[size] = _measure_decoding(scale, source, images, out, size)
        workloads.append(Workload(backbone, images, source, decoding[size]))
    engines = [name for name in ENGINES if scale.device.type != "cpu" or "fp16" not in name]
    for engine in [*engines, *(COMPILED if scale.compiles else ())]:
        for workload in workloads:
            with out.record_failure(f"{workload.backbone.name} {engine}"):
                _measure_engine(scale, workload, engine, work / "rows", out)


def _measure_engine(scale: Scale, workload: Workload, engine_name: str, folder: Path, out: FigureFile) -> None:
    """Measure one engine with one network."""
    kind, precision = engine_name.split()
    backbone, name = workload.backbone, f"{workload.backbone.name} {engine_name}"
    prefix = PrefixSpec(backbone, backbone.cut, workload.encode, "channels_last", scale.device, "32-true")
    factory = EngineFactory(folder, prefix, "", workload.first_images)
    (option,) = factory.options(kind, precision)  # type: ignore[arg-type]
    start = time.perf_counter()
    engine = option.build()
    measure(engine, workload.first_images())
    build_seconds = time.perf_counter() - start
    synthetic = _synthetic_rate(scale, backbone, engine, kind, precision, workload.first_images())
    count = min(len(workload.images), max(int(synthetic * 2 * scale.seconds), 8 * engine.batch_size))
    rate, utilization = _steady_rate(scale, engine, workload.images[:count], workload.source, option.space)
    shutil.rmtree(folder)
    bottleneck = "the GPU" if synthetic < workload.decoding else "decoding"
    size = f"batch size {engine.batch_size}"
    note = f"{count} photographs in {utilization.seconds:.1f} s, {size}, {build_seconds:.1f} s to build; {utilization}"
    out.add(f"{name}, synthetic", synthetic, "images/s", "uint8 tensors on the device")
    out.add(f"{name}, from photographs", rate, "images/s", note)
    out.add(f"{name}, share of synthetic", rate / synthetic, "", f"the lower limit is {bottleneck}")
    if scale.device.type == "cuda":
        decoding_bound = bottleneck == "decoding" and rate >= MIN_DECODING_SHARE * workload.decoding
        holds = rate >= MIN_SYNTHETIC_SHARE * synthetic or decoding_bound
        out.check(f"{name}: {MIN_SYNTHETIC_SHARE:.0%} of synthetic, or limited by decoding", holds, str(utilization))


def _measure_decoding(scale: Scale, source: Source, images: Views, out: FigureFile, size: int) -> float:
    """Images per second that all cores read, decode and transform as in extraction, without a network."""
    discard = _Discard(scale.device)
    count = min(len(images), scale.images)
    rate, utilization = _steady_rate(scale, discard, images[:count], source, cast(Space, discard))
    free = shutil.disk_usage("/dev/shm").free / 2**30
    note = f"{count} photographs, {cores()} cores, {free:.1f} GiB of shared memory; {utilization}"
    out.add(f"decoding alone at {size} px", rate, "images/s", note)
    return rate


def _steady_rate(
    scale: Scale, engine: Engine, images: Views, source: Source, space: Space
) -> tuple[float, Utilization]:
    """Images per second from the first batch to the last, without the start-up of the decoding processes."""
    counts: list[int] = []
    with measure_utilization(scale.device) as utilization:

        def on_batch(count: int) -> None:
            counts.append(count)
            is_first = len(counts) == 1 and count < len(images)
            utilization.restart() if is_first else utilization.mark()

        extract(engine, images, source, space, on_batch=on_batch)
    return sum(counts[1:] or counts) / utilization.seconds, utilization


class _Discard:
    """An engine that computes nothing, and a space that stores nothing, so that only decoding is measured."""

    single_threaded = False
    tunes_batch_size = False
    batch_size = 128

    def __init__(self, device: torch.device) -> None:
        self.prefetch = 3 if device.type != "cpu" else 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """One zero per image."""
        return torch.zeros(len(images), 1)

    def write(self, keys: object, rows: torch.Tensor) -> None:
        """Discard the rows."""


@torch.inference_mode()
def _measure_plain(scale: Scale, backbone: Backbone, out: FigureFile) -> None:
    """Measure the eager backbone without an engine."""
    count, size = 64 if scale.device.type == "cuda" else 16, backbone.preprocessing.crop
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=scale.device)
    for layout, layout_name in ((torch.contiguous_format, "contiguous"), (torch.channels_last, "channels_last")):
        backbone.to(memory_format=layout)  # type: ignore[call-overload]
        batch = images.contiguous(memory_format=layout)
        for dtype, dtype_name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16 autocast")):
            with torch.autocast(scale.device.type, dtype, enabled=dtype != torch.float32):
                rate = _rate(scale, lambda batch=batch: backbone(batch), count)
            name = f"{backbone.name} plain PyTorch, {dtype_name}, {layout_name}"
            out.add(name, rate, "images/s", "tensors on the device")


def _synthetic_rate(
    scale: Scale, backbone: Backbone, engine: Engine, kind: str, precision: str, images: torch.Tensor
) -> float:
    """Images per second of an engine's network at its batch size, on images in device memory."""
    size = engine.batch_size
    batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].to(scale.device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    network: Callable[[torch.Tensor], torch.Tensor] = backbone
    if (kind, precision) != ("torch", "fp32"):
        network = FrozenPrefix(backbone, backbone.cut, DTYPES[precision]).to(scale.device)
    if kind == "compile":
        network = torch.compile(network, dynamic=False)
    with torch.no_grad():
        return _rate(scale, lambda: network(batch), size)


def _rate(scale: Scale, call: Callable[[], object], batch_size: int) -> float:
    """Images per second of a call, with the device synchronized before and after."""

    def synchronize() -> None:
        if scale.device.type == "cuda":
            torch.cuda.synchronize(scale.device)

    for _ in range(3):
        call()
    synchronize()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < scale.seconds:
        for _ in range(4):
            call()
        synchronize()
        calls += 4
    return calls * batch_size / (time.perf_counter() - start)
