"""Memory that a process of a warm fit takes to find its rows, per million of them, on a store that is made here.

    python -m tests.benchmarks.store_memory --rows 1000000 4000000

Rows are of a few bytes, as what is measured is the look-up: digests, keys, the index, the loader's order and labels.
What the source of the images takes for their names and labels is measured beside it. Memory that is shared with the
page cache (the mapped index) is given up when the look-up ends, and counts in the peak alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from project.data.samplers import EpochOrder
from project.data.sources.base import Sample
from project.data.sources.digits import Digits
from project.features.row_loader import RowLoader, Rows
from project.features.store import Space
from project.features.views import distinct, image_views

SHARD = 1 << 16  # rows
MB = 2**20
SOURCE: Any = Digits.__new__(Digits)  # whose decoder has a name, and whose images nobody reads


def digests_of(count: int) -> np.ndarray:
    """SHA-256 of so many numbers, uint8 ``(N, 32)``."""
    found = np.empty((count, 32), np.uint8)
    for number in range(count):
        found[number] = np.frombuffer(hashlib.sha256(number.to_bytes(8, "little")).digest(), np.uint8)
    return found


def views(samples: list[Sample], digests: np.ndarray) -> Any:
    return image_views(SOURCE, samples, digests, "a transform", [""])  # type: ignore[arg-type]


def build(root: Path, count: int) -> None:
    """Write a store, and its index."""
    space = Space(root, {})
    (of_all,) = views([Sample("", 0)] * count, digests_of(count))
    for at in range(0, count, SHARD):
        keys = of_all.keys[at : at + SHARD]
        space.write(keys, torch.zeros(len(keys), 8, dtype=torch.float16))
    space.refresh_index()


def resident() -> dict[str, int]:
    """Bytes of this process in memory, now and at most, and those that are its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[key].split()[0]) * 1024 for name, key in NAMES.items()}


NAMES = {"now": "VmRSS", "own": "RssAnon", "peak": "VmHWM"}


def look_up(root: Path, count: int, answers: Any) -> None:
    """What a warm fit does before it trains, measured in a process of its own."""
    trim = ctypes.CDLL(None).malloc_trim
    samples = [Sample("", 0)] * count  # one object: the source's are measured apart
    small, _ = distinct([views(samples[:2], digests_of(2))])  # whatever is imported or started once
    Space(root / "other", {}).find(small.keys)
    gc.collect()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = resident(), time.perf_counter()
    digests = digests_of(count)
    hashed = time.perf_counter()
    plain = views(samples, digests)
    del digests
    everything, [[place]] = distinct([plain])
    del plain
    looked = time.perf_counter()
    found = Space(root, {}).find(everything.keys)
    assert not len(found.missing)
    seconds = time.perf_counter() - looked
    del everything
    rows = Rows(found, 0, torch.device("cpu"))
    labels = torch.zeros(count, dtype=torch.int32)
    loader = RowLoader(
        rows, torch.from_numpy(place[None]), labels, 256, EpochOrder(count, True, batch_size=256), lambda: 0
    )
    gc.collect()
    trim(0)
    after = resident()
    next(iter(loader))
    answers.put(
        {
            "resident": after["now"] - before["now"],
            "own": after["own"] - before["own"],
            "peak": resident()["peak"] - before["now"],
            "seconds of the look-up": seconds,
            "seconds in all": time.perf_counter() - began - (hashed - began),
        }
    )


def names(count: int, answers: Any) -> None:
    """What the source of so many images takes for names and labels."""
    before = resident()["now"]
    samples = [Sample(f"/data/photographs/train/class_{n % 1000:04d}/{n:09d}.jpg", n % 1000) for n in range(count)]
    answers.put(resident()["now"] - before)
    del samples


def in_a_process(work: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=work, args=(*arguments, answers))
    process.start()
    found = answers.get(timeout=900)
    process.join()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000])
    options = parser.parse_args()
    print("| rows | resident MB per million | own | peak | seconds of the look-up | names MB per million |")
    print("|---|---|---|---|---|---|")
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(_build, Path(folder), count)
            found = in_a_process(look_up, Path(folder), count)
        million = MB * count / 1e6
        cells = [f"{found[name] / million:.1f}" for name in ("resident", "own", "peak")]
        cells += [f"{found['seconds of the look-up']:.2f}", f"{in_a_process(names, count) / million:.1f}"]
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


def _build(root: Path, count: int, answers: Any) -> None:
    build(root, count)
    answers.put(True)


if __name__ == "__main__":
    main()
