"""A head trained on a frozen ResNet50: the article's loop, plain Lightning, and this project, cold and warm.

    python -m tests.benchmarks.frozen_fit --data DIR --epochs 10

``DIR`` holds ``{train,val}/CLASS/*.jpg``. The contestants take turns, each a process of its own, timed from outside
with its imports. Those that compute every image in every epoch run for a few epochs only: their time for all is what
they need besides, plus the epochs at the pace that was measured. A cold fit has an empty store and nothing compiled
before; a warm one has the same store and another learning rate. Random weights: no download, and the same time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import Ran, fit, middle, process, progress, sizes, some, table, told

CONTESTANTS = ("article", "lightning", "cold", "warm", "epoch")
HUNDRED = 100  # epochs of the longer fit


@dataclass(frozen=True)
class Row:
    """One measurement of a contestant.

    Attributes:
        seconds: Of the whole process, for all epochs.
        epoch: Seconds an epoch, where it was measured.
        peak: Memory in MB.
        startup: Seconds besides the epochs, where they were measured.
    """

    seconds: float
    epoch: float | None
    peak: float
    startup: float = 0.0


class Benchmark:
    """The measurements so far.

    Args:
        options: Flags.
        data: Folder of the images.
    """

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        self.options = options
        self.data = data
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.rates: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.limits: list[dict[str, float]] = []
        self.network = ["--network", options.network, "--size", options.size]

    def round(self) -> None:
        """Each contestant once."""
        wanted = self.options.only
        self.limit()
        if "article" in wanted:
            self.every_epoch("article", self.options.article_epochs, "article")
        for precision in self.options.precision if "lightning" in wanted else []:
            flags = ("lightning", "--precision", precision)
            self.every_epoch(f"lightning {precision}", self.options.lightning_epochs, *flags)
        for precision in self.options.precision if {"cold", "warm", "epoch"} & set(wanted) else []:
            self.ours(precision)
        self.limit()

    def limit(self) -> None:
        """How fast the machine's matrix products are now."""
        ran = process("tests.benchmarks.contestants", "limits", *self.network)
        self.limits.append(json.loads(ran.output.splitlines()[-1]))

    def every_epoch(self, name: str, epochs: int, *flags: str) -> None:
        """Measure a contestant that computes all images in each epoch; the first one's extra is start-up."""
        ran = process("tests.benchmarks.contestants", *flags, "--data", self.data, "--epochs", epochs, *self.network)
        each = json.loads(ran.output.splitlines()[-1])["epochs"]
        pace = middle(each[1:] or each)
        startup = ran.seconds - len(each) * pace
        whole = ran.seconds if epochs == self.options.epochs else startup + self.options.epochs * pace
        self.add(name, Row(whole, pace, ran.peak, startup))

    def ours(self, precision: str) -> None:
        """Cold, warm, and warm for more epochs, on one store."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            store, cache = Path(folder, "store"), Path(folder, "cache")
            cold = self.fit(precision, store, cache, options.epochs, 0.001)
            self.add(f"cold {precision}", Row(cold.seconds, None, cold.peak))
            said = told(cold.output)
            assert said is not None and said.rate is not None, cold.output
            self.rates[precision].append((said.rate, said.engine))
            if {"warm", "epoch"} & set(options.only):
                warm = self.fit(precision, store, cache, options.epochs, 0.01)
                assert told(warm.output).computed == 0, warm.output
                epoch = None
                if "epoch" in options.only:
                    more = self.fit(precision, store, cache, options.epochs + options.extra, 0.01)
                    epoch = (more.seconds - warm.seconds) / options.extra
                self.add(f"warm {precision}", Row(warm.seconds, epoch, warm.peak))
        if options.hundred:
            with tempfile.TemporaryDirectory() as folder:
                ran = self.fit(precision, Path(folder, "store"), Path(folder, "cache"), HUNDRED, 0.001)
                self.add(f"cold {precision}, {HUNDRED} epochs", Row(ran.seconds, None, ran.peak))

    def fit(self, precision: str, store: Path, cache: Path, epochs: int, rate: float) -> Ran:
        """Run the project."""
        options = self.options
        size = [] if options.size == 224 else ["--model.image_size", options.size]
        return fit(
            *(self.data, store, "--model.backbone", options.network, "--model.weights", "null", *size),
            *("--trainer.max_epochs", epochs, "--trainer.precision", precision, "--model.optimizer.lr", rate),
            cache=cache,
        )

    def add(self, name: str, row: Row) -> None:
        """Keep a measurement, and say so."""
        self.rows[name].append(row)
        pace = "" if row.epoch is None else f", {row.epoch:.3f} s an epoch"
        progress(f"{name}: {row.seconds:.1f} s{pace}, {row.peak:.0f} MB")

    def seconds(self, name: str) -> float | None:
        """Of the whole process, the median."""
        return middle(row.seconds for row in self.rows[name]) if self.rows.get(name) else None

    def epoch(self, name: str) -> float | None:
        """Seconds an epoch, the median."""
        known = [row.epoch for row in self.rows.get(name, []) if row.epoch is not None]
        return middle(known) if known else None

    def report(self) -> None:
        """Print what was found."""
        options, count = self.options, sizes(self.data)
        print(
            f"\n{options.network} at {options.size} px, {count['train']} train and {count['val']} val images of "
            f"{self.data.name}, {options.epochs} epochs, median of {options.rounds} rounds. Images/s: images trained "
            "on a second of the whole process. Peak memory: of the largest process. A * is extrapolated from fewer "
            "epochs.\n"
        )
        header = ["contestant", "s, whole process", "s an epoch", "images/s", "peak memory, MB", "times the article"]
        table(header, [self._row(name, count["train"]) for name in self.rows])
        print()
        for line in [*self._ratios(), *self._limits()]:
            print(f"- {line}")

    def _row(self, name: str, train: int) -> list[str]:
        options, seconds, epoch, base = self.options, self.seconds(name), self.epoch(name), self.seconds("article")
        assert seconds is not None
        ran = {"article": options.article_epochs, "lightning": options.lightning_epochs}.get(name.split()[0])
        epochs = HUNDRED if name.endswith(" epochs") else options.epochs
        if base is not None and epochs == HUNDRED:
            base = self._article(HUNDRED)
        peak = middle(row.peak for row in self.rows[name])
        return [
            name,
            f"{seconds:.1f}{'*' if ran not in (None, epochs) else ''}",
            "" if epoch is None else f"{epoch:.3f}",
            f"{epochs * train / seconds:.0f}",
            f"{peak:.0f}",
            "" if base is None else f"{base / seconds:.1f}",
        ]

    def _article(self, epochs: int) -> float | None:
        pace = self.epoch("article")
        return None if pace is None else middle(row.startup for row in self.rows["article"]) + epochs * pace

    def _ratios(self) -> list[str]:
        lines: list[str] = []
        for precision in self.options.precision:
            hundred = f"cold {precision}, {HUNDRED} epochs"
            pairs = [
                (f"cold {precision}", "article", self.seconds("article"), self.seconds(f"cold {precision}")),
                (f"warm {precision}", "article", self.seconds("article"), self.seconds(f"warm {precision}")),
                (hundred, f"article, {HUNDRED} epochs", self._article(HUNDRED), self.seconds(hundred)),
                (
                    *(f"one cached epoch {precision}", "one epoch of the article"),
                    *(self.epoch("article"), self.epoch(f"warm {precision}")),
                ),
                (
                    *(f"cold {precision}", "lightning of the same precision"),
                    *(self.seconds(f"lightning {precision}"), self.seconds(f"cold {precision}")),
                ),
            ]
            for ours, other, slow, fast in pairs:
                if slow and fast:
                    ran = self.options.lightning_epochs if "lightning" in other else self.options.article_epochs
                    epochs = HUNDRED if ours == hundred else self.options.epochs
                    star = "*" if ran != epochs and "one epoch" not in other else ""
                    lines.append(
                        f"{ours} against {other}: {slow / fast:.1f} times ({slow:.2f}{star} s to {fast:.2f} s)"
                    )
        return lines

    def _limits(self) -> list[str]:
        flops = self.limits[0]["flops"]
        lines, best = [f"the network: {flops / 1e9:.2f} GFLOP an image"], {}
        for kind in ("bf16", "fp32"):
            found = [limit[kind] for limit in self.limits]
            best[kind] = max(found)
            lines.append(
                f"matrix products, {kind}: {best[kind] / 1e9:.0f} GFLOP/s at best of {len(found)} "
                f"(least {min(found) / 1e9:.0f}), so {best[kind] / flops:.0f} images/s"
            )
        for precision, found in self.rates.items():
            rate, engine = middle(rate for rate, _ in found), ", ".join(dict.fromkeys(name for _, name in found))
            shares = " and ".join(f"{rate * flops / best[kind]:.0%} of {kind}'s" for kind in best)
            lines.append(f"extraction at {precision}: {rate:.0f} images/s by {engine}, decoding included: {shares}")
        return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--network", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--article-epochs", type=int, default=1, help="that are run")
    parser.add_argument("--lightning-epochs", type=int, default=2, help="that are run")
    parser.add_argument("--extra", type=int, default=100, help="epochs that a cached one is measured with")
    parser.add_argument("--hundred", action="store_true", help=f"run a cold fit of {HUNDRED} epochs too")
    parser.add_argument("--images", type=int, help="take so many, about, not all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, some(options.data, options.images, Path(folder)))
        for _ in range(options.rounds):
            benchmark.round()
        benchmark.report()


if __name__ == "__main__":
    main()
