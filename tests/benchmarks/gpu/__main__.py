"""GPU benchmark: measures the project on one GPU in at most eight minutes and prints one table.

    python -m tests.benchmarks.gpu --photographs DIR --json gpu.json

``DIR`` contains ``{train,val}/CLASS/*.jpg``; its images are repeated under other names until there are enough to
decode. Each section runs in a process of its own with a time limit. A section that fails or times out is reported and
keeps the figures measured so far; the others still run. Without a GPU, a smoke test runs all sections at small scale on
the CPU in one process; its figures are not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from project.runtime.system import cores
from tests.benchmarks.gpu.figures import Figure, FigureFile, environment, read_figures, table
from tests.benchmarks.gpu.photographs import generate, repeat
from tests.benchmarks.gpu.scale import Scale, full, small
from tests.benchmarks.measure import ROOT

Section = Callable[[Scale, Path, Path, FigureFile], None]
#: Function and time limit in seconds of each section; together less than eight minutes.
SECTIONS = {
    "extraction": ("extraction.extraction", 100),
    "fit": ("stored_fit.stored_fit", 65),
    "correctness": ("correctness.correctness", 115),
    "finetune": ("finetune.finetune", 60),
    "inference": ("inference.inference", 20),
    "config": ("shipped_config.shipped_config", 55),
    "finetune_compiled": ("finetune.finetune_compiled", 55),
}
TOTAL = 470  # time limit in seconds of all sections


def run_section(name: str, scale: Scale, photographs: Path, work: Path, figures: Path) -> bool:
    """Run one section; record a failure as a figure.

    Returns:
        Whether the section completed.
    """
    module, _, function = SECTIONS[name][0].partition(".")
    out, start = FigureFile(figures, name), time.perf_counter()
    print(f"== {name}", flush=True)
    completed = False
    with out.record_failure("section completes"):
        section: Section = getattr(import_module(f"tests.benchmarks.gpu.{module}"), function)
        section(scale, photographs, work / name, out)
        completed = True
    out.add("section duration", time.perf_counter() - start, "s")
    return completed


def run_sections(
    names: Sequence[str], photographs: Path, work: Path, figures: Path, report: Callable[[], object] = lambda: None
) -> None:
    """Run each section in a process of its own, which is killed with its children at its time limit.

    A section may also use the time that earlier sections did not need.

    Args:
        names: Names of the sections.
        photographs: ``{train,val}/CLASS/*.jpg``.
        work: Output folder.
        figures: File to append figures to.
        report: Called after each section.
    """
    deadline = time.monotonic() + min(TOTAL, sum(SECTIONS[name][1] for name in names))
    for index, name in enumerate(names):
        reserved = sum(SECTIONS[later][1] for later in names[index + 1 :])
        seconds = max(deadline - time.monotonic() - reserved, 1)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--photographs", str(photographs)]
        command += ["--only", name, "--figures", str(figures), "--work", str(work)]
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        failure = ""
        try:
            if code := child.wait(seconds):
                failure = f"exit code {code}"
        except subprocess.TimeoutExpired:
            failure = f"timed out after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if failure:
            FigureFile(figures, name).check("section process exits with code 0", False, failure)
        report()


def main() -> int:
    """Run the sections and print the table.

    Returns:
        Exit code: 0, or 1 if a section failed or a check does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="{train,val}/CLASS/*.jpg; without a GPU, default: noise")
    parser.add_argument("--json", type=Path, help="output file for all figures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--small", action="store_true", help="run the CPU smoke test even if there is a GPU")
    # Internal flags for the process of a single section.
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    has_gpu = torch.cuda.is_available() and not options.small
    scale = full(cores()) if has_gpu else small()
    if options.figures is not None:
        return 0 if run_section(options.only[0], scale, options.photographs, options.work, options.figures) else 1
    if has_gpu and options.photographs is None:
        parser.error("--photographs is required on a GPU")
    # Children of a killed section may still write to the folder while it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work, figures = Path(folder), Path(folder, "figures.jsonl")
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        original = options.photographs or generate(work / "noise")
        photographs = repeat(original, work / "photographs", scale.train, scale.val)
        if has_gpu:
            run_sections(options.only, photographs, work, figures, lambda: write_json(options.json, figures, scale))
        else:
            torch.set_num_threads(1)  # the sections start processes that need the other cores
            for name in options.only:
                run_section(name, scale, photographs, work, figures)
        results, machine = write_json(options.json, figures, scale)
    print("\n" + "\n".join(table(results, machine)))
    failed = [figure for figure in results if figure.holds is False]
    print(f"\n{len(failed)} failed" if failed else "\nAll sections completed, and all checks hold.")
    for figure in failed:
        print(f"- {figure.section}: {figure.name}: {figure.note}")
    return 1 if failed else 0


def write_json(path: Path | None, figures: Path, scale: Scale) -> tuple[list[Figure], dict[str, str]]:
    """Write all figures so far with the environment; called after each section, so that a later abort loses nothing."""
    results, machine = read_figures(figures), environment(scale.device)
    if path is not None:
        path.write_text(json.dumps({"machine": machine, "figures": [asdict(figure) for figure in results]}, indent=1))
    return results, machine


if __name__ == "__main__":
    sys.exit(main())
