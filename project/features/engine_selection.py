"""Which engine computes the rows: the one that has them all soonest, on this machine, for this network.

What counts is the whole time that is left: building the engine, and computing the rows that its own space lacks. So
rows that are there decide by themselves, and no measurement, however noisy, can throw a good store away. Rates are
remembered a machine and a network; one that is not known yet is measured, unless the machine's matrix products are too
slow for it to win.
"""

from __future__ import annotations

import contextlib
import json
import math
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

from project.errors import DataError, StoreError
from project.features.engine_options import EngineOption
from project.features.engines import DTYPES, Engine, Precision
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.atomic_write import replacing

SLACK = 1.25  # how much faster than the matrix product that is measured here an engine has been seen to be
MEASURING = 0.4  # seconds
MOST = 1024  # images a call on a GPU


@dataclass(frozen=True)
class EngineChoice:
    """What was chosen.

    Attributes:
        index: Of the one among the options.
        engine: Built already, where it was measured.
        reason: Why, in words.
    """

    index: int
    engine: Engine | None
    reason: str


@dataclass(frozen=True)
class ImageCost:
    """What one image costs.

    Attributes:
        flops: Floating-point operations, a multiplication and an addition counted as two.
        shape: Of its row.
    """

    flops: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)


def cost(backbone: Backbone, cut: Cut, device: torch.device) -> ImageCost:
    """Count what the frozen prefix does to one image, by running it."""
    size = backbone.preprocessing.crop
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        rows = backbone.encode(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device), cut)
    return ImageCost(counter.get_total_flops() // 2, tuple(rows.shape[1:]))


def choose(
    options: Sequence[EngineOption],
    missing: Sequence[int],
    images: Callable[[], torch.Tensor],
    flops: int,
    device: torch.device,
    rates: RateFile,
) -> EngineChoice:
    """Choose among engines.

    Args:
        options: One at least, the preferred first.
        missing: Rows that the space of each lacks.
        images: Makes some images to measure with, uint8 ``(B, 3, H, W)``.
        flops: Of one image.
        device: Where they compute.
        rates: What is known of them, and is to be remembered.
    """
    if 0 in missing:
        return EngineChoice(missing.index(0), None, "all rows are stored")
    if len(options) == 1:
        return EngineChoice(0, None, "it was asked for, or is the only one")
    ceilings = {precision: ceiling(precision, device) for precision in {option.precision for option in options}}
    built: dict[int, Engine] = {}
    seconds: dict[int, float] = {}
    told: list[str] = []
    sample: torch.Tensor | None = None
    least = [
        option.startup + count * flops / (SLACK * ceilings[option.precision])
        for option, count in zip(options, missing, strict=True)
    ]
    for index in sorted(range(len(options)), key=least.__getitem__):
        option = options[index]
        rate = rates.get(str(option))
        if rate is None and seconds and least[index] >= min(seconds.values()):
            told.append(f"{option} could not pay")
            continue
        if rate is None:
            sample = images() if sample is None else sample
            try:
                built[index] = option.build()
                rate = measure(built[index], sample)
            except (StoreError, DataError):
                raise
            except Exception as error:  # whatever an exporter or a compiler raises: there are other engines
                words = str(error).strip().partition("\n")[0][:80]
                told.append(f"{option} cannot be built ({type(error).__name__}: {words})")
                continue
            rates.put(str(option), rate)
        startup = 0.0 if index in built else option.startup
        seconds[index] = startup + missing[index] / rate
        told.append(f"{option} {rate:.0f} images/s")
    if not seconds:
        return EngineChoice(0, None, "; ".join(told))
    best = min(seconds, key=lambda index: seconds[index])
    return EngineChoice(best, built.get(best), "; ".join(told))


def measure(engine: Engine, images: torch.Tensor) -> float:
    """Images a second of an engine alone, decoding left out. The batch of a GPU grows meanwhile, while that pays.

    Args:
        engine: What is measured.
        images: uint8 ``(B, 3, H, W)``, repeated as needed.
    """
    threads = torch.get_num_threads()
    lanes = threads if engine.side_by_side else 1
    best, rate = engine.batch_size, 0.0
    with ThreadPoolExecutor(lanes, "lane", torch.set_num_threads, (1 if engine.side_by_side else threads,)) as pool:
        try:
            while True:
                size = engine.batch_size
                batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
                now = _time(pool, lanes, lambda _, batch=batch: engine(batch), size)  # type: ignore[misc]
                if engine.grows and now < rate * 1.05:
                    break
                best, rate = size, now
                if not engine.grows or size >= MOST:
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


def _time(pool: ThreadPoolExecutor, lanes: int, call: Callable[[int], Any], size: int) -> float:
    list(pool.map(call, range(lanes)))  # warm
    began, best, rounds = time.perf_counter(), 0.0, 0
    while time.perf_counter() - began < MEASURING or rounds < 2:
        start = time.perf_counter()
        list(pool.map(call, range(lanes)))
        best = max(best, lanes * size / (time.perf_counter() - start))  # what else runs here only ever makes it slower
        rounds += 1
    return best


def ceiling(precision: Precision, device: torch.device) -> float:
    """Floating-point operations a second of a matrix product: what no network gets far beyond.

    Args:
        precision: Of the factors; int8 is taken for four times float32.
        device: Where.
    """
    dtype, times = (torch.float32, 4) if precision == "int8" else (DTYPES[precision], 1)
    side, rounds = (1024, 3) if device.type == "cpu" else (8192, 5)
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return times * best


class RateFile:
    """Images a second of each engine, remembered in a file.

    Args:
        path: The file; ``None`` remembers nothing.
        network: What they are rates of, besides this machine.
        device: Where it computes.
    """

    def __init__(self, path: Path | None, network: str, device: torch.device) -> None:
        self._path = path
        self._key = f"{machine(device)}, {network}"

    def get(self, engine: str) -> float | None:
        """The rate of an engine, if it is known."""
        value = self._read().get(self._key, {}).get(engine)
        return float(value) if isinstance(value, (int, float)) and value > 0 else None

    def put(self, engine: str, rate: float) -> None:
        """Remember the rate of an engine. Where the folder cannot be written, it is measured again next time."""
        if self._path is None:
            return
        known = self._read()
        known.setdefault(self._key, {})[engine] = round(rate, 2)
        # It is no more than a note; the rows that follow say what is wrong with the folder.
        with contextlib.suppress(OSError), replacing(self._path) as temporary:
            temporary.write_text(json.dumps(known, indent=1))

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            known: dict[str, dict[str, Any]] = json.loads(self._path.read_text())
        except ValueError:  # damaged: what is in it can be measured again
            return {}
        known = known if isinstance(known, dict) else {}
        return {key: rates for key, rates in known.items() if isinstance(rates, dict)}


def machine(device: torch.device) -> str:
    """What tells this machine from others that are faster or slower."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()} x {torch.get_num_threads()}"
    return f"{name}, torch {version('torch')}"
