"""Time to train a head on a frozen ResNet50: the article's loop, plain Lightning, and this project, cold and warm.

    python -m tests.benchmarks.frozen_fit --data DIR --epochs 10

``DIR`` contains ``{train,val}/CLASS/*.jpg``. The programs alternate, each in a process of its own that is timed from
outside, imports included. Those that compute every image in every epoch run for a few epochs only; their total time is
extrapolated from the start-up time and the seconds per epoch. A cold fit starts with an empty feature store and an
empty compiler cache; a warm fit uses the same store with another learning rate. Weights are random, which takes the
same time and needs no download.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.benchmarks.measure import (
    CompletedRun,
    parse_features_line,
    print_table,
    progress,
    run_fit,
    run_module,
    split_sizes,
    subset,
)

PROGRAMS = ("article", "lightning", "cold", "warm", "epoch")
HUNDRED = 100  # epochs of the longer fit


@dataclass(frozen=True)
class Measurement:
    """One run of a program.

    Attributes:
        seconds: Wall time of the whole process for all epochs, extrapolated where it ran fewer.
        epoch: Seconds per epoch; ``None`` if not measured.
        peak: Peak memory in MB.
        startup: Seconds outside the epochs; 0 if not measured.
    """

    seconds: float
    epoch: float | None
    peak: float
    startup: float = 0.0


class Benchmark:
    """Runs the programs and collects their measurements.

    Args:
        options: Parsed flags.
        data: Folder of the images.
    """

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        self.options = options
        self.data = data
        self.measurements: dict[str, list[Measurement]] = defaultdict(list)
        self.rates: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.limits: list[dict[str, float]] = []
        self.network = ["--network", options.network, "--size", options.size]

    def run_round(self) -> None:
        """Run each program once."""
        selected = self.options.only
        self.measure_limits()
        if "article" in selected:
            self.measure_baseline("article", self.options.article_epochs, "article")
        for precision in self.options.precision if "lightning" in selected else []:
            flags = ("lightning", "--precision", precision)
            self.measure_baseline(f"lightning {precision}", self.options.lightning_epochs, *flags)
        for precision in self.options.precision if {"cold", "warm", "epoch"} & set(selected) else []:
            self.measure_project(precision)
        self.measure_limits()

    def measure_limits(self) -> None:
        """Measure the matrix multiplication rate of the machine."""
        run = run_module("tests.benchmarks.contestants", "limits", *self.network)
        self.limits.append(json.loads(run.output.splitlines()[-1]))

    def measure_baseline(self, name: str, epochs: int, *flags: str) -> None:
        """Measure a baseline; extra time of its first epoch counts as start-up."""
        run = run_module("tests.benchmarks.contestants", *flags, "--data", self.data, "--epochs", epochs, *self.network)
        epoch_seconds = json.loads(run.output.splitlines()[-1])["epochs"]
        epoch = median(epoch_seconds[1:] or epoch_seconds)
        startup = run.seconds - len(epoch_seconds) * epoch
        seconds = run.seconds if epochs == self.options.epochs else startup + self.options.epochs * epoch
        self.add(name, Measurement(seconds, epoch, run.peak, startup))

    def measure_project(self, precision: str) -> None:
        """Measure a cold fit, a warm fit and a longer warm fit on one store."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            store, cache = Path(folder, "store"), Path(folder, "cache")
            cold = self.fit(precision, store, cache, options.epochs, 0.001)
            self.add(f"cold {precision}", Measurement(cold.seconds, None, cold.peak))
            features = parse_features_line(cold.output)
            assert features is not None and features.rate is not None, cold.output
            self.rates[precision].append((features.rate, features.engine))
            if {"warm", "epoch"} & set(options.only):
                warm = self.fit(precision, store, cache, options.epochs, 0.01)
                features = parse_features_line(warm.output)
                assert features is not None and features.computed == 0, warm.output
                epoch = None
                if "epoch" in options.only:
                    longer = self.fit(precision, store, cache, options.epochs + options.extra, 0.01)
                    epoch = (longer.seconds - warm.seconds) / options.extra
                self.add(f"warm {precision}", Measurement(warm.seconds, epoch, warm.peak))
        if options.hundred:
            with tempfile.TemporaryDirectory() as folder:
                run = self.fit(precision, Path(folder, "store"), Path(folder, "cache"), HUNDRED, 0.001)
                self.add(f"cold {precision}, {HUNDRED} epochs", Measurement(run.seconds, None, run.peak))

    def fit(self, precision: str, store: Path, cache: Path, epochs: int, learning_rate: float) -> CompletedRun:
        """Run the project's ``fit``."""
        options = self.options
        size = [] if options.size == 224 else ["--model.image_size", options.size]
        return run_fit(
            *(self.data, store, "--model.backbone", options.network, "--model.weights", "null", *size),
            *("--trainer.max_epochs", epochs, "--trainer.precision", precision),
            *("--model.optimizer.lr", learning_rate),
            cache=cache,
        )

    def add(self, name: str, measurement: Measurement) -> None:
        """Record a measurement and print it."""
        self.measurements[name].append(measurement)
        epoch = "" if measurement.epoch is None else f", {measurement.epoch:.3f} s per epoch"
        progress(f"{name}: {measurement.seconds:.1f} s{epoch}, {measurement.peak:.0f} MB")

    def seconds(self, name: str) -> float | None:
        """Median wall time of the whole process."""
        runs = self.measurements.get(name)
        return median(run.seconds for run in runs) if runs else None

    def epoch(self, name: str) -> float | None:
        """Median seconds per epoch."""
        seconds = [run.epoch for run in self.measurements.get(name, []) if run.epoch is not None]
        return median(seconds) if seconds else None

    def report(self) -> None:
        """Print the results."""
        options, count = self.options, split_sizes(self.data)
        print(
            f"\n{options.network} at {options.size} px, {count['train']} train and {count['val']} val images of "
            f"{self.data.name}, {options.epochs} epochs, median of {options.rounds} rounds. Images/s: training images "
            "per second of the whole process. Peak memory: that of the largest process. *: extrapolated from fewer "
            "epochs.\n"
        )
        header = ["program", "whole process, s", "epoch, s", "images/s", "peak memory, MB", "speedup over article"]
        print_table(header, [self._row(name, count["train"]) for name in self.measurements])
        print()
        for line in [*self._ratios(), *self._limits()]:
            print(f"- {line}")

    def _row(self, name: str, train: int) -> list[str]:
        options, seconds, epoch, article = self.options, self.seconds(name), self.epoch(name), self.seconds("article")
        assert seconds is not None
        measured = {"article": options.article_epochs, "lightning": options.lightning_epochs}.get(name.split()[0])
        epochs = HUNDRED if name.endswith(" epochs") else options.epochs
        if article is not None and epochs == HUNDRED:
            article = self._article_seconds(HUNDRED)
        peak = median(run.peak for run in self.measurements[name])
        return [
            name,
            f"{seconds:.1f}{'*' if measured not in (None, epochs) else ''}",
            "" if epoch is None else f"{epoch:.3f}",
            f"{epochs * train / seconds:.0f}",
            f"{peak:.0f}",
            "" if article is None else f"{article / seconds:.1f}",
        ]

    def _article_seconds(self, epochs: int) -> float | None:
        epoch = self.epoch("article")
        return None if epoch is None else median(run.startup for run in self.measurements["article"]) + epochs * epoch

    def _ratios(self) -> list[str]:
        lines: list[str] = []
        for precision in self.options.precision:
            hundred = f"cold {precision}, {HUNDRED} epochs"
            pairs = [
                (f"cold {precision}", "article", self.seconds("article"), self.seconds(f"cold {precision}")),
                (f"warm {precision}", "article", self.seconds("article"), self.seconds(f"warm {precision}")),
                (hundred, f"article, {HUNDRED} epochs", self._article_seconds(HUNDRED), self.seconds(hundred)),
                (
                    *(f"one cached epoch {precision}", "one epoch of the article"),
                    *(self.epoch("article"), self.epoch(f"warm {precision}")),
                ),
                (
                    *(f"cold {precision}", "lightning of the same precision"),
                    *(self.seconds(f"lightning {precision}"), self.seconds(f"cold {precision}")),
                ),
            ]
            for name, baseline, slow, fast in pairs:
                if slow and fast:
                    measured = self.options.lightning_epochs if "lightning" in baseline else self.options.article_epochs
                    epochs = HUNDRED if name == hundred else self.options.epochs
                    star = "*" if measured != epochs and "one epoch" not in baseline else ""
                    seconds = f"{slow:.2f}{star} s to {fast:.2f} s"
                    lines.append(f"{name} against {baseline}: {slow / fast:.1f} times as fast ({seconds})")
        return lines

    def _limits(self) -> list[str]:
        flops = self.limits[0]["flops"]
        lines, ceilings = [f"network: {flops / 1e9:.2f} GFLOP per image"], {}
        for kind in ("bf16", "fp32"):
            values = [limit[kind] for limit in self.limits]
            ceilings[kind] = max(values)
            lines.append(
                f"matrix multiplication, {kind}: best of {len(values)} {ceilings[kind] / 1e9:.0f} GFLOP/s "
                f"(worst {min(values) / 1e9:.0f}), at most {ceilings[kind] / flops:.0f} images/s"
            )
        for precision, runs in self.rates.items():
            rate, engines = median(rate for rate, _ in runs), ", ".join(dict.fromkeys(engine for _, engine in runs))
            shares = " and ".join(f"{rate * flops / ceiling:.0%} of {kind}" for kind, ceiling in ceilings.items())
            lines.append(
                f"extraction, {precision}: {rate:.0f} images/s with {engines}, decoding included; utilization {shares}"
            )
        return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--network", default="resnet50", help="a torchvision ResNet")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS, help="programs to run")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"], help="trainer precisions")
    parser.add_argument("--article-epochs", type=int, default=1, help="epochs to run of the article's loop")
    parser.add_argument("--lightning-epochs", type=int, default=2, help="epochs to run of plain Lightning")
    parser.add_argument("--extra", type=int, default=100, help="additional epochs to time an epoch on stored rows")
    parser.add_argument("--hundred", action="store_true", help=f"also run a cold fit of {HUNDRED} epochs")
    parser.add_argument("--images", type=int, help="approximate number of images; default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, subset(options.data, options.images, Path(folder)))
        for _ in range(options.rounds):
            benchmark.run_round()
        benchmark.report()


if __name__ == "__main__":
    main()
