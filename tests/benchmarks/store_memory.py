"""Memory that a warm fit needs to look up its stored rows, per million rows of a generated feature store.

    python -m tests.benchmarks.store_memory --rows 1000000 4000000

Rows are a few bytes each, because the lookup is what is measured: digests, keys, index, the loader's order and labels.
The memory of the source for names and labels is measured separately. The mapped index is shared with the page cache and
released when the lookup ends, so it counts only towards the peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from project.data.samplers import EpochOrder
from project.data.sources.base import Sample
from project.data.sources.digits import Digits
from project.features.row_loader import RowLoader, Rows
from project.features.store import Space
from project.features.views import deduplicate, image_views
from tests.benchmarks.measure import print_table

SHARD = 1 << 16  # rows
MB = 2**20
SOURCE: Any = Digits.__new__(Digits)  # only its decoder's name is used; no image is read
#: Fields of /proc/self/status.
STATUS_FIELDS = {"rss": "VmRSS", "private": "RssAnon", "peak": "VmHWM"}


def make_digests(count: int) -> np.ndarray:
    """SHA-256 of the first ``count`` numbers, uint8 ``(N, 32)``."""
    digests = np.empty((count, 32), np.uint8)
    for number in range(count):
        digests[number] = np.frombuffer(hashlib.sha256(number.to_bytes(8, "little")).digest(), np.uint8)
    return digests


def make_views(samples: list[Sample], digests: np.ndarray) -> Any:
    return image_views(SOURCE, samples, digests, "a transform", [""])  # type: ignore[arg-type]


def build_store(root: Path, count: int) -> None:
    """Write a feature store and its index."""
    space = Space(root, {})
    (views,) = make_views([Sample("", 0)] * count, make_digests(count))
    for first in range(0, count, SHARD):
        keys = views.keys[first : first + SHARD]
        space.write(keys, torch.zeros(len(keys), 8, dtype=torch.float16))
    space.refresh_index()


def process_memory() -> dict[str, int]:
    """Resident, private and peak memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[key].split()[0]) * 1024 for name, key in STATUS_FIELDS.items()}


def measure_lookup(root: Path, count: int) -> dict[str, float]:
    """Memory in bytes, and lookup time in seconds, of what a warm fit does before it trains."""
    trim = ctypes.CDLL(None).malloc_trim
    samples = [Sample("", 0)] * count  # one shared object: the source's memory is measured separately
    warm_up, _ = deduplicate([make_views(samples[:2], make_digests(2))])  # one-time imports and allocations
    Space(root / "other", {}).find(warm_up.keys)
    gc.collect()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = process_memory()
    digests = make_digests(count)
    plain = make_views(samples, digests)
    del digests
    views, [[indices]] = deduplicate([plain])
    del plain
    start = time.perf_counter()
    found = Space(root, {}).find(views.keys)
    assert not len(found.missing)
    seconds = time.perf_counter() - start
    del views
    rows = Rows(found, 0, torch.device("cpu"))
    labels = torch.zeros(count, dtype=torch.int32)
    loader = RowLoader(
        rows, torch.from_numpy(indices[None]), labels, 256, EpochOrder(count, True, batch_size=256), lambda: 0
    )
    gc.collect()
    trim(0)
    after = process_memory()
    next(iter(loader))
    return {
        "rss": after["rss"] - before["rss"],
        "private": after["private"] - before["private"],
        "peak": process_memory()["peak"] - before["rss"],
        "seconds": seconds,
    }


def measure_names(count: int) -> int:
    """Bytes that a source needs for names and labels."""
    before = process_memory()["rss"]
    samples = [Sample(f"/data/photographs/train/class_{n % 1000:04d}/{n:09d}.jpg", n % 1000) for n in range(count)]
    size = process_memory()["rss"] - before
    del samples
    return size


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its memory is measured alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=900)


def main() -> None:
    """Print a table with one row per number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000], help="numbers of rows")
    options = parser.parse_args()
    header = ["rows", "resident MB per million", "private", "peak", "lookup, s", "names, MB per million"]
    print_table(header, (_row(count) for count in options.rows))


def _row(count: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        run_in_process(build_store, Path(folder), count)
        lookup = run_in_process(measure_lookup, Path(folder), count)
    million = MB * count / 1e6
    cells = [f"{lookup[name] / million:.1f}" for name in STATUS_FIELDS]
    return [str(count), *cells, f"{lookup['seconds']:.2f}", f"{run_in_process(measure_names, count) / million:.1f}"]


if __name__ == "__main__":
    main()
