"""Engine selection: the engine with the lowest estimated total time on this machine, for this network.

The estimate covers building the engine and computing the rows missing from its space. Stored rows therefore take
precedence: a noisy measurement never discards a filled store. Measured rates are saved per machine and network.
An engine without a saved rate is measured, unless the machine's matrix-product throughput shows that it cannot win.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from project.features.engine_options import EngineOption
from project.features.engines import DTYPES, Engine, Precision
from project.features.frozen_prefix import PrefixSpec
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.atomic_write import atomic_write

SLACK = 1.25  # highest observed ratio of an engine's FLOP rate to that of the matrix product
MEASURE_SECONDS = 0.4
MAX_BATCH = 1024  # images per call on a GPU


@dataclass(frozen=True)
class EngineChoice:
    """Result of the selection.

    Attributes:
        index: Index of the chosen option.
        engine: The engine, if it was built to be measured.
        reason: Explanation for the log.
    """

    index: int
    engine: Engine | None
    reason: str


@dataclass(frozen=True)
class ImageCost:
    """Cost of one image.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as two.
        shape: Shape of its row.
    """

    flops: int
    shape: tuple[int, ...]


def cost(backbone: Backbone, cut: Cut, device: torch.device) -> ImageCost:
    """Count the operations of the frozen prefix by running it."""
    size = backbone.preprocessing.crop
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        rows = backbone.encode(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device), cut)
    return ImageCost(counter.get_total_flops() // 2, tuple(rows.shape[1:]))


def choose_for_prefix(
    prefix: PrefixSpec,
    root: Path,
    options: Sequence[EngineOption],
    missing: Sequence[int],
    images: Callable[[], torch.Tensor],
) -> EngineChoice:
    """Choose the engine of a frozen prefix, with the rates that are saved in the store.

    Args:
        prefix: The frozen prefix.
        root: Folder of the store.
        options: At least one option, in order of preference.
        missing: Number of rows missing from the space of each option.
        images: Returns images to measure with, uint8 ``(B, 3, H, W)``.
    """
    backbone, cut, device = prefix.backbone, prefix.cut, prefix.device
    must_measure = all(missing) and len(options) > 1
    flops = cost(backbone, cut, device).flops if must_measure else 0
    network = f"{backbone.name} to {cut.frozen[-1]} at {backbone.preprocessing.crop} px"
    return choose(options, missing, images, flops, device, RateFile(root / "rates.json", network, device))


def choose(
    options: Sequence[EngineOption],
    missing: Sequence[int],
    images: Callable[[], torch.Tensor],
    flops: int,
    device: torch.device,
    rates: RateFile,
) -> EngineChoice:
    """Choose an engine.

    Args:
        options: At least one option, in order of preference.
        missing: Number of rows missing from the space of each option.
        images: Returns images to measure with, uint8 ``(B, 3, H, W)``.
        flops: Floating-point operations per image.
        device: Device of the engines.
        rates: Saved rates; new measurements are added.
    """
    if 0 in missing:
        return EngineChoice(missing.index(0), None, "all rows are stored")
    if len(options) == 1:
        return EngineChoice(0, None, "the only candidate")
    peak = {precision: matmul_flops(precision, device) for precision in {option.precision for option in options}}
    built: dict[int, Engine] = {}
    seconds: dict[int, float] = {}
    notes: list[str] = []
    sample: torch.Tensor | None = None
    lower_bounds = [
        option.startup + count * flops / (SLACK * peak[option.precision])
        for option, count in zip(options, missing, strict=True)
    ]
    for index in sorted(range(len(options)), key=lower_bounds.__getitem__):
        option = options[index]
        rate = rates.get(str(option))
        if rate is None and seconds and lower_bounds[index] >= min(seconds.values()):
            notes.append(f"{option} cannot be faster")
            continue
        if rate is None:
            sample = images() if sample is None else sample
            try:
                built[index] = option.build()
                rate = measure(built[index], sample)
            except Exception as error:  # anything: exporters and compilers raise many types
                message = str(error).strip().partition("\n")[0][:80]
                notes.append(f"{option} cannot be built ({type(error).__name__}: {message})")
                continue
            rates.put(str(option), rate)
        startup = 0.0 if index in built else option.startup
        seconds[index] = startup + missing[index] / rate
        notes.append(f"{option} {rate:.0f} images/s")
    best = min(seconds, key=seconds.__getitem__, default=0)  # if none can be built, the first one reports why
    return EngineChoice(best, built.get(best) if seconds else None, "; ".join(notes))


def measure(engine: Engine, images: torch.Tensor) -> float:
    """Measure an engine in images per second, without decoding; tune its batch size if it allows that.

    Args:
        engine: The engine. Its batch size is doubled while that makes it faster.
        images: uint8 ``(B, 3, H, W)``, repeated to fill a batch.
    """
    threads = torch.get_num_threads()
    workers = threads if engine.single_threaded else 1
    best, rate = engine.batch_size, 0.0
    with ThreadPoolExecutor(workers, "engine", torch.set_num_threads, (threads // workers,)) as pool:
        try:
            while True:
                size = engine.batch_size
                batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
                current = _rate(pool, workers, lambda _, batch=batch: engine(batch), size)  # type: ignore[misc]
                if engine.tunes_batch_size and current < rate * 1.05:
                    break
                best, rate = size, current
                if not engine.tunes_batch_size or size >= MAX_BATCH:
                    break
                engine.batch_size *= 2
        except torch.OutOfMemoryError:
            torch.accelerator.empty_cache()
            if not rate:
                raise
        finally:
            engine.batch_size = best
            torch.set_num_threads(threads)
    return rate


def _rate(pool: ThreadPoolExecutor, workers: int, call: Callable[[int], Any], size: int) -> float:
    list(pool.map(call, range(workers)))  # warm-up
    began, best, rounds = time.perf_counter(), 0.0, 0
    while time.perf_counter() - began < MEASURE_SECONDS or rounds < 2:
        start = time.perf_counter()
        list(pool.map(call, range(workers)))
        best = max(best, workers * size / (time.perf_counter() - start))  # other load only makes a round slower
        rounds += 1
    return best


def matmul_flops(precision: Precision, device: torch.device) -> float:
    """Floating-point operations per second of a matrix product: a practical upper bound for any network.

    Args:
        precision: Data type of the factors; int8 counts as four times float32.
        device: Device to measure.
    """
    dtype, factor = (torch.float32, 4) if precision == "int8" else (DTYPES[precision], 1)
    side, rounds = (1024, 3) if device.type == "cpu" else (8192, 5)
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        float((left @ right)[0, 0])  # synchronizes with the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return factor * best


class RateFile:
    """JSON file with the measured images per second of each engine.

    Args:
        path: The file.
        network: Identifies the network and its input size.
        device: Device of the engines.
    """

    def __init__(self, path: Path, network: str, device: torch.device) -> None:
        self._path = path
        self._key = f"{machine_name(device)}, {network}"

    def get(self, engine: str) -> float | None:
        """The saved rate of an engine, or ``None``."""
        value = self._read().get(self._key, {}).get(engine)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None

    def put(self, engine: str, rate: float) -> None:
        """Save the rate of an engine. A folder that cannot be written is ignored: writing rows to it reports that."""
        rates = self._read()
        rates.setdefault(self._key, {})[engine] = round(rate, 2)
        with contextlib.suppress(OSError), atomic_write(self._path) as temporary:
            temporary.write_text(json.dumps(rates, indent=1))

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.is_file():
            return {}
        try:
            content = json.loads(self._path.read_text())
        except ValueError:  # corrupt: measure again
            return {}
        content = content if isinstance(content, dict) else {}
        return {key: rates for key, rates in content.items() if isinstance(rates, dict)}


def machine_name(device: torch.device) -> str:
    """Identifies hardware and torch version, so that rates are not reused on a different machine."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} x {torch.get_num_threads()}"
    return f"{name}, torch {version('torch')}"
