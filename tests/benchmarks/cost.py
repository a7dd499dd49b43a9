"""What a million images and more cost, in bytes and hours: measured here by the image, and multiplied.

    python -m tests.benchmarks.cost --data DIR/flowers5

``DIR/flowers5`` holds ``{train,val}/CLASS/*.jpg``. Measured on this machine: bytes of a ResNet50 row on disk and of an
image in memory, images a second that its CPU computes and that one core reads and decodes, and the seconds of an epoch
of a linear head on stored rows. Each is the best of a few, as what else runs here only ever makes it slower.
``--gpu-rate``, as ``tests.benchmarks.gpu`` measures it on a card, adds the hours of GPUs; each waits where the cores
beside it cannot decode as fast.
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
from project.features.row_loader import RowLoader, Rows
from project.features.store import Space, as_keys, row_key
from project.features.views import digest_images, distinct, image_views, load_image
from project.models.backbone import load_backbone
from project.runtime.distributed import ProcessGroup
from tests.benchmarks.decoding import ours, rate
from tests.benchmarks.measure import progress, some, stored, table

WIDTH, CLASSES = 2048, 1000
CPU = torch.device("cpu")
COUNTS = {"ImageNet, 1.3 M": 1_300_000, "100 M": 100_000_000}


@dataclass(frozen=True)
class Extracted:
    """What a precision makes of an image."""

    bytes: float
    rate: float


def extracted(data: Path, precision: str, folder: Path) -> Extracted:
    """Bytes of a row, and images a second of torch on this CPU, decoding included."""
    backbone = load_backbone("resnet50", None).eval()
    backbone.to(memory_format=torch.channels_last)
    source = Folder(str(data))
    samples, transform = source.splits["train"], evaluation(backbone.preprocessing)
    images, _ = distinct(
        [image_views(source, samples, digest_images(source, samples, ProcessGroup()), transform, [""])]
    )
    engines = EngineFactory(
        *(
            folder,
            backbone,
            backbone.cut,
            lambda batch: backbone(batch.contiguous(memory_format=torch.channels_last)),
            CPU,
        ),
        *("benchmark", lambda: torch.stack([load_image(source, image) for image in images[:8]]), "channels_last"),
    )
    (option,) = engines.options("torch", precision, "32-true")
    engine = option.build()
    engine(torch.stack([load_image(source, image) for image in images[: engine.batch_size]]))  # warm
    seconds = []
    for _ in range(2):
        shutil.rmtree(option.space.path, ignore_errors=True)
        began = time.perf_counter()
        extract(engine, images, source, option.space)
        seconds.append(time.perf_counter() - began)
    return Extracted(stored(folder) / len(images), len(images) / min(seconds))


def keys(count: int) -> list[bytes]:
    return [row_key(number.to_bytes(8, "little"), "") for number in range(count)]


def in_memory(data: Path, count: int = 20_000) -> float:
    """Bytes of Python's memory that a process of a fit needs for an image: its name, digest, key and place."""
    source = Folder(str(data))
    transform = evaluation(load_backbone("resnet18", None).preprocessing)
    tracemalloc.start()
    samples = [Sample(f"/data/imagenet/train/n01440764/n01440764_{number:08}.JPEG", 0) for number in range(count)]
    digests = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    views, _places = distinct([image_views(source, samples, digests, transform, [""])])
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / len(views)


def epoch(rows: Rows, batch_size: int, cold: Path | None, most: int) -> float:
    """Rows a second of a linear head's training steps. Rows of a cold disk are first dropped from the page cache."""
    count = len(rows)
    labels = torch.arange(count) % CLASSES
    loader = RowLoader(rows, torch.arange(count)[None], labels, batch_size, EpochOrder(count, True, 0, None), lambda: 0)
    head = torch.nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
    if cold:
        for path in cold.rglob("*.safetensors"):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    began, seen = time.perf_counter(), 0
    for batch in loader:
        loss = functional.cross_entropy(head(batch.rows.float()), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(batch.targets)
        if seen >= most:
            break
    return seen / (time.perf_counter() - began)


def epochs(count: int, folder: Path) -> Iterator[tuple[str, int, float]]:
    """Where the rows are, images a batch, and rows a second."""
    space = Space(folder, {})
    every = as_keys(keys(count))
    for part in torch.arange(count).split(16_384):
        space.write(every[part.numpy()], torch.randn(len(part), WIDTH, dtype=torch.bfloat16))
    began = time.perf_counter()
    found = space.find(every)
    progress(f"{count} rows looked up and verified in {time.perf_counter() - began:.1f} s")
    for where, memory, cold in (("memory", 2**40, None), ("page cache", 0, None), ("disk", 0, folder)):
        rows = Rows(found, memory, CPU)
        for batch_size in (32, 1024, 4096):
            speed = max(epoch(rows, batch_size, cold, min(count, 500 * batch_size)) for _ in range(3))
            progress(f"{where}, batches of {batch_size}: {speed:.0f} rows/s")
            yield where, batch_size, speed
        rows.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--images", type=int, default=128, help="that are computed")
    parser.add_argument("--rows", type=int, default=65_536, help="of the measured epochs")
    parser.add_argument("--gpu-rate", type=float, help="images/s that tests.benchmarks.gpu has measured on a GPU")
    parser.add_argument("--gpu-cores", type=int, default=16, help="cores beside each GPU that decode for it")
    options = parser.parse_args()
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        few = some(options.data, options.images, Path(folder))
        made = {name: extracted(few, name, Path(folder, name)) for name in ("bf16", "fp32")}
        torch.set_num_threads(1)  # two that wait for each other would measure what else runs here
        speeds = list(epochs(options.rows, Path(folder, "rows")))
    source = options.data.resolve() / "train"
    transform = evaluation(load_backbone("resnet50", None).preprocessing)
    decoded = max(rate(ours(source, transform)) for _ in range(3))
    held = in_memory(options.data)
    print(f"\nMeasured here, ResNet50 at 224 px, {cores} cores unless said otherwise:\n")
    table(
        ["what", "figure"],
        [
            *[[f"{name}: bytes of a row on disk", f"{one.bytes:.0f}"] for name, one in made.items()],
            *[[f"{name}: images/s computed, decoding included", f"{one.rate:.1f}"] for name, one in made.items()],
            ["images/s read, decoded and resized by one core", f"{decoded:.0f}"],
            ["bytes of memory an image, in each process", f"{held:.0f}"],
            *[
                [f"rows/s of a linear head on one core, {CLASSES} classes, from {w}, batch {b}", f"{s:.0f}"]
                for w, b, s in speeds
            ],
        ],
    )
    best = {where: max(speed for place, _, speed in speeds if place == where) for where in ("memory", "disk")}
    gpus: dict[str, float] = {}
    if options.gpu_rate is None:
        print("\nMultiplied. Extraction is not measured on a GPU: --gpu-rate adds it.\n")
    else:
        fed = min(options.gpu_rate, options.gpu_cores * decoded)
        gpus = {f"hours, {count} GPU(s)": fed * count for count in (1, 64)}
        print(
            f"\nMultiplied. A GPU computes {options.gpu_rate:.0f} images/s and has {options.gpu_cores} cores, which "
            f"decode {options.gpu_cores * decoded:.0f}: it gets {fed:.0f} images/s.\n"
        )
    header = [
        *("images", "rows bf16, GB", "rows fp32, GB", f"hours, {cores} cores", *gpus),
        *("memory a process, GB", "minutes an epoch, one core, from memory", "from disk"),
    ]
    table(
        header,
        [
            [
                *(name, *(f"{count * one.bytes / 1e9:.1f}" for one in made.values())),
                f"{count / made['bf16'].rate / 3600:.3g}",
                *(f"{count / images_per_second / 3600:.2g}" for images_per_second in gpus.values()),
                f"{count * held / 1e9:.1f}",
                *(f"{count / best[where] / 60:.1f}" for where in ("memory", "disk")),
            ]
            for name, count in COUNTS.items()
        ],
    )


if __name__ == "__main__":
    main()
