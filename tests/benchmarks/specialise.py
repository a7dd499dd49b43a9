"""Compare how much of the backbone is trained: accuracy, trained parameters, checkpoint, time, drift of the features.

    python -m tests.benchmarks.specialise --data DIR
    python -m tests.benchmarks.specialise --data DIR --sets flowers5 --ways probe "last stage" --seeds 1

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn at 112 px.
Each way is ``configs/finetune.yaml`` with other values of ``model.trainable`` and ``model.adapter``; the probe is the
default ``fit``. The accuracy of the last epoch is not chosen by the validation images; that of the best epoch is. All
start from the solved head, so the gain is the difference to epoch 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.data_sets import ALL, DIGITS, NETWORKS, data_sets
from tests.benchmarks.measure import ROOT, print_table, progress, run_module

Fit = tuple[str, int, str, str]
FINE_TUNE = ("-c", ROOT / "configs/finetune.yaml")
SGD = ("--model.optimizer", "SGD", "--model.optimizer.lr", "0.01", "--model.optimizer.momentum", "0.9")
#: Flags of each way.
WAYS: dict[str, tuple[object, ...]] = {
    "probe": (),
    "biases": (*FINE_TUNE, "--model.trainable", "all", "--model.adapter", "bias"),
    "LoRA": ("-c", ROOT / "configs/lora.yaml"),
    "last stage": (*FINE_TUNE, "--model.trainable", "-1"),
    "last stage, SGD": (*FINE_TUNE, *SGD),
    "last two stages": (*FINE_TUNE, "--model.trainable", "-2"),
    "all stages": (*FINE_TUNE, "--model.trainable", "all"),
}


@dataclass(frozen=True)
class Specialised:
    """Result of one fit.

    Attributes:
        initial: Validation accuracy of the solved head.
        last: Validation accuracy after the last epoch.
        best: Validation accuracy of the best epoch.
        parameters: Number of trained parameters.
        bytes: Size of ``best.ckpt``.
        seconds: Time of the whole process.
        drift: Linear CKA of the final features with the pretrained ones; 1 if no stage is trained.
    """

    initial: float
    last: float
    best: float
    parameters: int
    bytes: int
    seconds: float
    drift: float


def specialise(flags: Sequence[object], folder: Path) -> Specialised:
    """Run ``fit`` in its own process.

    Args:
        flags: Its flags.
        folder: Empty folder for the run.
    """
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_module(
        *("project", "fit", *flags, "--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false")
    )
    (version,) = folder.glob("*/version_0")
    events = EventAccumulator(str(version))
    events.Reload()
    accuracies = [event.value for event in events.Scalars("val/accuracy")]
    drift = [event.value for event in events.Scalars("drift/cka")] if "drift/cka" in events.Tags()["scalars"] else [1.0]
    best = version / "checkpoints/best.ckpt"
    last = torch.load(version / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    optimized = [index for group in last["optimizer_states"][0]["param_groups"] for index in group["params"]]
    states = last["optimizer_states"][0]["state"]
    parameters = sum(max(value.numel() for value in states[index].values()) for index in optimized if index in states)
    return Specialised(
        accuracies[0], accuracies[-1], max(accuracies), parameters, best.stat().st_size, run.seconds, drift[-1]
    )


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def cells(results: Sequence[Specialised]) -> list[str]:
    """Columns of the table.

    Args:
        results: One for each seed.
    """
    first = results[0]
    return [
        _spread([result.initial for result in results], 3),
        _spread([result.last for result in results], 3),
        _spread([result.best for result in results], 3),
        f"{first.parameters:,}",
        f"{first.bytes:,}",
        _spread([result.seconds for result in results], 0),
        _spread([result.drift for result in results], 3),
        str(len(results)),
    ]


def read_results(file: Path) -> dict[Fit, list[Specialised]]:
    """Results of an earlier command, by data set, number of validation images, network and way."""
    results: dict[Fit, list[Specialised]] = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        results.setdefault(tuple(record["fit"]), []).append(Specialised(**record["result"]))
    return results


def main() -> None:
    """Print one row per data set, network and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    parser.add_argument("--networks", nargs="+", default=["Lite0"], choices=NETWORKS)
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=WAYS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, help="input size in pixels of photographs; default: that of the weights")
    parser.add_argument("--jobs", type=int, default=1, help="fits that run at once; more than 1 distorts the seconds")
    parser.add_argument("--json", type=Path, help="file to which each result is appended")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags of all fits; last argument")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results_file = options.json or folder / "results.jsonl"
        results_file.touch()
        fits = []
        for seed in range(options.seeds):  # outermost: a stopped command has the same number of seeds for all ways
            for name, root, size in data_sets(options.data, options.sets, folder):
                count = sum(1 for _ in (root / "val").glob("*/*"))
                pixels = size if name == DIGITS else options.size
                for network in options.networks:
                    backbone, weights = NETWORKS[network]
                    flags = ["--model.backbone", backbone, "--model.weights", weights, "--data.root", root]
                    flags += ["--features.folder", folder / "store", "--seed_everything", seed]
                    flags += ["--model.image_size", pixels] if pixels else []
                    for way in options.ways:
                        fits.append(((name, count, network, way), [*WAYS[way], *flags, *options.flags]))

        def run(fit: Fit, flags: Sequence[object]) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                result = specialise(flags, Path(runs))
            line = json.dumps({"fit": fit, "result": asdict(result)})
            with results_file.open("a") as file:
                file.write(f"{line}\n")
            progress(line)

        with ThreadPoolExecutor(options.jobs) as pool:
            for done in [pool.submit(run, *fit) for fit in fits]:
                done.result()
        results = read_results(results_file)
    rows = [[f"{name}, {network} ({count})", way, *cells(of)] for (name, count, network, way), of in results.items()]
    header = ["data set, network (validation images)", "trained", "epoch 0", "last epoch", "best epoch"]
    print_table([*header, "trained parameters", "bytes of best.ckpt", "seconds", "CKA with the start", "seeds"], rows)


if __name__ == "__main__":
    main()
