"""Measure the project on one GPU, in at most eight minutes, and print one table.

    python -m tests.benchmarks.gpu --photographs DIR --json gpu.json

``DIR`` holds ``{train,val}/CLASS/*.jpg``; its images are repeated under other names until there are enough to decode.
Each section is a process of its own with a time limit: one that fails or takes too long is reported, keeps the figures
that it has measured, and the others run. Without a card everything runs small on the CPU, in one process, to show that
the script works; such figures are no measurement.
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
#: Each section's function, and the seconds that it may take on a card: together less than eight minutes.
SECTIONS = {
    "extraction": ("extraction.extraction", 105),
    "fit": ("stored_fit.stored_fit", 75),
    "promises": ("promises.promises", 95),
    "finetune": ("finetune.finetune", 60),
    "inference": ("inference.inference", 20),
    "config": ("shipped_config.shipped_config", 55),
    "finetune_compiled": ("finetune.finetune_compiled", 60),
}
TOTAL = 470  # seconds of all sections


def run_section(name: str, scale: Scale, photographs: Path, work: Path, figures: Path) -> bool:
    """Run one section; a failure becomes a figure that says why.

    Returns:
        Whether the section ran to its end.
    """
    module, _, function = SECTIONS[name][0].partition(".")
    out, began = FigureFile(figures, name), time.perf_counter()
    print(f"== {name}", flush=True)
    ran = False
    with out.attempt("the section runs to its end"):
        section: Section = getattr(import_module(f"tests.benchmarks.gpu.{module}"), function)
        section(scale, photographs, work / name, out)
        ran = True
    out.add("seconds of the section", time.perf_counter() - began, "s")
    return ran


def run_sections(
    names: Sequence[str], photographs: Path, work: Path, figures: Path, report: Callable[[], object] = lambda: None
) -> None:
    """Run each section in a process of its own, killed with its children when its time is over.

    A section may also use the time that those before it have left over.

    Args:
        names: Of the sections.
        photographs: ``{train,val}/CLASS/*.jpg``.
        work: Folder to write to.
        figures: File that figures are appended to.
        report: Called after each section.
    """
    until = time.monotonic() + min(TOTAL, sum(SECTIONS[name][1] for name in names))
    for at, name in enumerate(names):
        later = sum(SECTIONS[each][1] for each in names[at + 1 :])
        seconds = max(until - time.monotonic() - later, 1)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--photographs", str(photographs)]
        command += ["--only", name, "--figures", str(figures), "--work", str(work)]
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        why = ""
        try:
            if code := child.wait(seconds):
                why = f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if why:
            FigureFile(figures, name).promise("the section's process ends well", False, why)
        report()


def main() -> int:
    """Measure and print.

    Returns:
        Exit code: 0; 1 where a section failed or a promise does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="{train,val}/CLASS/*.jpg; without a card, noise by default")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--small", action="store_true", help="run small on the CPU although there is a card")
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)  # of one section: append them here
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of one section: folder with the photographs
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    has_card = torch.cuda.is_available() and not options.small
    scale = full(cores()) if has_card else small()
    if options.figures is not None:
        return 0 if run_section(options.only[0], scale, options.photographs, options.work, options.figures) else 1
    if has_card and options.photographs is None:
        parser.error("--photographs is needed")
    # A killed section may leave a process that still writes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work, figures = Path(folder), Path(folder, "figures.jsonl")
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        given = options.photographs or generate(work / "noise")
        photographs = repeat(given, work / "photographs", scale.train, scale.val)
        if has_card:
            run_sections(options.only, photographs, work, figures, lambda: write_json(options.json, figures, scale))
        else:
            torch.set_num_threads(1)  # the sections' own processes need the other cores
            for name in options.only:
                run_section(name, scale, photographs, work, figures)
        found, machine = write_json(options.json, figures, scale)
    print("\n" + "\n".join(table(found, machine)))
    failed = [each for each in found if each.holds is False]
    _report(failed)
    return 1 if failed else 0


def write_json(path: Path | None, figures: Path, scale: Scale) -> tuple[list[Figure], dict[str, str]]:
    """Write all figures so far, with their machine; after each section, so that nothing is lost when time is over."""
    found, machine = read_figures(figures), environment(scale.device)
    if path is not None:
        path.write_text(json.dumps({"machine": machine, "figures": [asdict(each) for each in found]}, indent=1))
    return found, machine


def _report(failed: Sequence[Figure]) -> None:
    print(f"\n{len(failed)} failed" if failed else "\nAll sections ran to their end, and every promise holds.")
    for each in failed:
        print(f"- {each.section}: {each.name}: {each.note}")


if __name__ == "__main__":
    sys.exit(main())
