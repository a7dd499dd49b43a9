"""Cost of large collections in bytes and hours, extrapolated from the cost per image on this machine.

    python -m tests.benchmarks.cost --data DIR/flowers5

``DIR/flowers5`` contains ``{train,val}/CLASS/*.jpg``. Measured on this machine: bytes per ResNet50 row on disk, bytes
per image in memory, images/s that the CPU computes, images/s that one core reads and decodes, and the time per epoch of
a linear head on stored rows. Each figure is the best of several runs, because other load only slows a run down.
``--gpu-rate``, as measured by ``tests.benchmarks.gpu``, adds the hours on GPUs, limited by the decoding rate of their
CPU cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from project.data.samplers import EpochOrder
from project.data.sources.base import Sample
from project.data.sources.folder import Folder
from project.data.transforms import evaluation
from project.features.engine_options import EngineFactory
from project.features.extraction import extract
from project.features.frozen_prefix import PrefixSpec
from project.features.row_loader import RowLoader, Rows
from project.features.store import Space, as_keys, row_key
from project.features.views import deduplicate, digest_images, image_views, load_image
from project.models.loading import load_backbone
from project.runtime.distributed import ProcessGroup
from tests.benchmarks.decoding import decoding_rate, project_dataset
from tests.benchmarks.measure import print_table, progress, store_bytes, subset

WIDTH, CLASSES = 2048, 1000
CPU = torch.device("cpu")
COUNTS = {"ImageNet, 1.3 M": 1_300_000, "100 M": 100_000_000}


@dataclass(frozen=True)
class ExtractionCost:
    """Cost of extraction in one precision.

    Attributes:
        row_bytes: Bytes per row on disk.
        rate: Images per second, decoding included.
    """

    row_bytes: float
    rate: float


def measure_extraction(data: Path, precision: str, folder: Path) -> ExtractionCost:
    """Extract features with the torch engine on this CPU."""
    backbone = load_backbone("resnet50", None).eval()
    backbone.to(memory_format=torch.channels_last)
    source = Folder(str(data))
    samples, transform = source.splits["train"], evaluation(backbone.preprocessing)
    images, _ = deduplicate(
        [image_views(source, samples, digest_images(source, samples, ProcessGroup()), transform, [""])]
    )

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return backbone(batch.contiguous(memory_format=torch.channels_last))

    def first_images(count: int = 8) -> torch.Tensor:
        return torch.stack([load_image(source, image) for image in images[:count]])

    prefix = PrefixSpec(backbone, backbone.cut, encode, "channels_last", CPU, "32-true")
    (option,) = EngineFactory(folder, prefix, "benchmark", first_images).options("torch", precision)
    engine = option.build()
    engine(first_images(engine.batch_size))  # warm-up
    seconds = []
    for _ in range(2):
        shutil.rmtree(option.space.path, ignore_errors=True)
        start = time.perf_counter()
        extract(engine, images, source, option.space)
        seconds.append(time.perf_counter() - start)
    return ExtractionCost(store_bytes(folder) / len(images), len(images) / min(seconds))


def memory_per_image(data: Path, count: int = 20_000) -> float:
    """Bytes of Python memory per image in each process of a fit: name, digest, key and row index."""
    source = Folder(str(data))
    transform = evaluation(load_backbone("resnet18", None).preprocessing)
    tracemalloc.start()
    samples = [Sample(f"/data/imagenet/train/n01440764/n01440764_{number:08}.JPEG", 0) for number in range(count)]
    digests = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    views, _row_indices = deduplicate([image_views(source, samples, digests, transform, [""])])
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / len(views)


def training_rate(rows: Rows, batch_size: int, evict: Path | None, limit: int) -> float:
    """Rows per second of a linear head's training steps.

    Args:
        rows: Stored rows.
        batch_size: Rows per batch.
        evict: Store whose files are dropped from the page cache first, or ``None``.
        limit: Number of rows after which the measurement ends.
    """
    count = len(rows)
    labels = torch.arange(count) % CLASSES
    loader = RowLoader(rows, torch.arange(count)[None], labels, batch_size, EpochOrder(count, True, 0, None), lambda: 0)
    head = torch.nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
    if evict:
        for path in evict.rglob("*.safetensors"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    start, seen = time.perf_counter(), 0
    for batch in loader:
        loss = functional.cross_entropy(head(batch.rows.float()), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(batch.targets)
        if seen >= limit:
            break
    return seen / (time.perf_counter() - start)


def measure_training(count: int, folder: Path) -> Iterator[tuple[str, int, float]]:
    """Location of the rows, batch size, and rows per second."""
    space = Space(folder, {})
    keys = as_keys([row_key(number.to_bytes(8, "little"), "") for number in range(count)])
    for chunk in torch.arange(count).split(16_384):
        space.write(keys[chunk.numpy()], torch.randn(len(chunk), WIDTH, dtype=torch.bfloat16))
    start = time.perf_counter()
    found = space.find(keys)
    progress(f"{count} rows looked up and verified in {time.perf_counter() - start:.1f} s")
    for location, memory, evict in (("memory", 2**40, None), ("page cache", 0, None), ("disk", 0, folder)):
        rows = Rows(found, memory, CPU)
        for batch_size in (32, 1024, 4096):
            rate = max(training_rate(rows, batch_size, evict, min(count, 500 * batch_size)) for _ in range(3))
            progress(f"{location}, batches of {batch_size}: {rate:.0f} rows/s")
            yield location, batch_size, rate
        rows.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--images", type=int, default=128, help="number of images to extract")
    parser.add_argument("--rows", type=int, default=65_536, help="number of rows to train on")
    parser.add_argument("--gpu-rate", type=float, help="images/s on a GPU, as measured by tests.benchmarks.gpu")
    parser.add_argument("--gpu-cores", type=int, default=16, help="CPU cores that decode for each GPU")
    options = parser.parse_args()
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        images = subset(options.data, options.images, Path(folder))
        costs = {name: measure_extraction(images, name, Path(folder, name)) for name in ("bf16", "fp32")}
        torch.set_num_threads(1)  # with more, other load on the machine stalls threads that wait for each other
        training = list(measure_training(options.rows, Path(folder, "rows")))
    dataset = project_dataset(
        options.data.resolve() / "train", evaluation(load_backbone("resnet50", None).preprocessing)
    )
    decoding = max(decoding_rate(dataset) for _ in range(3))
    memory = memory_per_image(options.data)
    print(f"\nMeasured on this machine, ResNet50 at 224 px, {cores} cores unless stated otherwise:\n")
    print_table(
        ["quantity", "value"],
        [
            *[[f"{name}: bytes per row on disk", f"{cost.row_bytes:.0f}"] for name, cost in costs.items()],
            *[[f"{name}: images/s extracted, decoding included", f"{cost.rate:.1f}"] for name, cost in costs.items()],
            ["images/s read, decoded and resized by one core", f"{decoding:.0f}"],
            ["bytes of memory per image in each process", f"{memory:.0f}"],
            *[
                [
                    f"rows/s of a linear head on one core, {CLASSES} classes, from {location}, batch size {batch_size}",
                    f"{rate:.0f}",
                ]
                for location, batch_size, rate in training
            ],
        ],
    )
    best = {name: max(rate for location, _, rate in training if location == name) for name in ("memory", "disk")}
    gpus: dict[str, float] = {}
    if options.gpu_rate is None:
        print("\nExtrapolated, without GPUs; --gpu-rate adds them:\n")
    else:
        gpu_decoding = options.gpu_cores * decoding
        fed = min(options.gpu_rate, gpu_decoding)
        gpus = {f"hours, {count} GPU(s)": fed * count for count in (1, 64)}
        print(
            f"\nExtrapolated. A GPU computes {options.gpu_rate:.0f} images/s; its {options.gpu_cores} cores decode "
            f"{gpu_decoding:.0f} images/s. Effective rate: {fed:.0f} images/s.\n"
        )
    header = [
        *("images", "rows bf16, GB", "rows fp32, GB", f"hours, {cores} cores", *gpus),
        *("memory per process, GB", "minutes per epoch, one core, from memory", "from disk"),
    ]
    print_table(
        header,
        [
            [
                *(name, *(f"{count * cost.row_bytes / 1e9:.1f}" for cost in costs.values())),
                f"{count / costs['bf16'].rate / 3600:.3g}",
                *(f"{count / rate / 3600:.2g}" for rate in gpus.values()),
                f"{count * memory / 1e9:.1f}",
                *(f"{count / best[location] / 60:.1f}" for location in ("memory", "disk")),
            ]
            for name, count in COUNTS.items()
        ],
    )


if __name__ == "__main__":
    main()
