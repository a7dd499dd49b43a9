"""Measured figures: what was measured, on which machine, and the table and JSON file that they end in."""

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
    """One measurement.

    Attributes:
        section: Section that measured it.
        name: What was measured.
        value: The measured value; ``None`` where a measurement failed or was skipped.
        unit: Unit of the value.
        note: Conditions of the measurement, or the reason for a missing value.
        holds: Whether a promise holds; ``None`` where the figure is no promise.
    """

    section: str
    name: str
    value: float | None
    unit: str = ""
    note: str = ""
    holds: bool | None = None

    def text(self) -> str:
        """The value as a table shows it."""
        if self.holds is not None:
            return "holds" if self.holds else "FAILS"
        if self.value is None:
            return "-"
        digits = f"{self.value:,.0f}" if abs(self.value) >= 100 else f"{self.value:.4g}"
        return f"{digits} {self.unit}".strip()


class FigureFile:
    """Figures as JSON lines in a file, one line a figure, so that a section that is killed keeps what it measured.

    Args:
        path: File that figures are appended to.
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
    def attempt(self, name: str) -> Iterator[None]:
        """Measure something that may fail: a failure becomes a figure, and what follows is measured all the same."""
        try:
            yield
        except Exception as error:  # whatever a compiler, a driver or a fit raises
            traceback.print_exc()
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.promise(name, False, f"{type(error).__name__}: {first[:200]}")

    def promise(self, name: str, holds: bool, note: str = "") -> None:
        """Append a promise that holds or does not."""
        self.add(name, holds, "", note, holds=holds)


def read_figures(path: Path) -> list[Figure]:
    """Read the figures of a file; a missing file has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [Figure(**json.loads(line)) for line in lines]


def environment(device: torch.device) -> dict[str, str]:
    """Card, driver, processor and library versions of this machine."""
    found = {"card": "none (CPU)", "driver": "none", "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", "driver": _driver()}
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    found["cpu"] = f"{models[0] if models else platform.processor()}, {len(models) or 1} cores"
    found["python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(figures: Sequence[Figure], machine: dict[str, str]) -> Iterator[str]:
    """Lines of a Markdown table of all figures, with the machine above it."""
    yield ", ".join(f"{key} {value}" for key, value in machine.items())
    yield ""
    yield "| section | what | figure | conditions |"
    yield "|---|---|---|---|"
    for each in figures:
        yield f"| {each.section} | {each.name} | {each.text()} | {each.note.replace('|', '/')} |"
