"""Figures of the GPU benchmark, the environment they were measured in, and their table."""

from __future__ import annotations

import json
import platform
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "torchmetrics", "jsonargparse")


@dataclass(frozen=True)
class Figure:
    """One measurement or check.

    Attributes:
        section: Section of the benchmark.
        name: Name of the measured quantity or of the check.
        value: Measured value; ``None`` if the measurement failed or was skipped.
        unit: Unit of the value.
        note: Conditions of the measurement, or the reason for a missing value.
        holds: Whether the check holds; ``None`` for a measurement.
    """

    section: str
    name: str
    value: float | None
    unit: str = ""
    note: str = ""
    holds: bool | None = None

    def text(self) -> str:
        """The value as shown in the table."""
        if self.holds is not None:
            return "holds" if self.holds else "FAILS"
        if self.value is None:
            return "-"
        digits = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.4g}"
        return f"{digits} {self.unit}".strip()


class FigureFile:
    """A JSON Lines file with one line per figure, so that a killed section keeps the figures measured so far.

    Args:
        path: File to append figures to.
        section: Section of the figures.
    """

    def __init__(self, path: Path, section: str) -> None:
        self._path = path
        self.section = section

    def add(
        self, name: str, value: float | bool | None, unit: str = "", note: str = "", holds: bool | None = None
    ) -> None:
        """Append a figure and print it."""
        figure = Figure(self.section, name, None if value is None else float(value), unit, note, holds)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(figure)) + "\n")
        print(f"  {name}: {figure.text()} {note}", flush=True)

    @contextmanager
    def record_failure(self, name: str) -> Iterator[None]:
        """Record an exception in the block as a failed check and continue after the block."""
        try:
            yield
        except Exception as error:  # whatever a compiler, a driver or a fit raises
            traceback.print_exc()
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.check(name, False, f"{type(error).__name__}: {first_line[:200]}")

    def check(self, name: str, holds: bool, note: str = "") -> None:
        """Append the result of a check."""
        self.add(name, holds, "", note, holds=holds)


def read_figures(path: Path) -> list[Figure]:
    """Read the figures of a file; empty for a missing file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Figure(**json.loads(line)) for line in lines]


def environment(device: torch.device) -> dict[str, str]:
    """GPU, driver, CPU and library versions of this machine."""
    machine = {"card": "none (CPU)", "driver": "none", "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "driver": _driver_version(),
        }
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    machine["cpu"] = f"{models[0] if models else platform.processor()}, {len(models) or 1} cores"
    machine["python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = "not installed"
    return machine


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(figures: Sequence[Figure], machine: dict[str, str]) -> Iterator[str]:
    """Lines of a Markdown table of all figures, after a line with the environment."""
    yield ", ".join(f"{key} {value}" for key, value in machine.items())
    yield ""
    yield "| section | name | figure | conditions |"
    yield "|---|---|---|---|"
    for figure in figures:
        yield f"| {figure.section} | {figure.name} | {figure.text()} | {figure.note.replace('|', '/')} |"
