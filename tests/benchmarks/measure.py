"""What the benchmarks share: a process timed from outside, some of a folder's images, a table.

It imports nothing heavy: the peak memory of a child is never less than that of the process that started it.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Ran:
    """A process that has ended well.

    Attributes:
        seconds: From its start to its end, measured from outside.
        peak: Most memory that it, or a single one of its own children, had resident, in MB.
        output: What it printed.
        busy: Seconds of processors that it took, with its children: what else the machine does disturbs them less.
    """

    seconds: float
    peak: float
    output: str
    busy: float


@dataclass(frozen=True)
class Told:
    """What a fit says of its features."""

    reused: int
    computed: int
    rate: float | None
    engine: str


def process(*arguments: object, cache: Path | None = None, expected: Sequence[int] = (0,)) -> Ran:
    """Run ``python -m ARGUMENTS`` in the repository, and wait for its end.

    Args:
        arguments: Module and flags.
        cache: Folder of what torch.compile keeps. By default a new one, so that no earlier run has compiled for this.
        expected: Exit codes that are no failure.

    Raises:
        RuntimeError: It failed; the message has what it printed.
    """
    command = [sys.executable, "-m", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as fresh, tempfile.TemporaryFile() as out:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or fresh), "COLUMNS": "400"}
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read().decode(errors="replace")
    if child.returncode not in expected:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{output[-4000:]}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return Ran(seconds, kilobytes * 1024 / 1e6, output, usage.ru_utime + usage.ru_stime)


def fit(data: Path, store: Path, *flags: object, cache: Path | None = None) -> Ran:
    """Run ``python -m project fit`` with features kept in a folder, and the run in a temporary one."""
    with tempfile.TemporaryDirectory() as runs:
        return process(
            *("project", "fit", "--data.root", data, "--features.folder", store, "--trainer.default_root_dir", runs),
            *("--trainer.enable_progress_bar", "false", *flags),
            cache=cache,
        )


def told(output: str) -> Told | None:
    """Read the line that a fit says of its features; ``None`` where it kept none."""
    found = re.search(
        r"Features: (\d+) rows reused, (\d+) computed(?: in [\d.]+ s \((\d+) images/s[^)]*\))?; (\w+ \w+)", output
    )
    if found is None:
        return None
    return Told(int(found[1]), int(found[2]), float(found[3]) if found[3] else None, found[4])


def sizes(data: Path) -> dict[str, int]:
    """Images of each split; a folder without splits is all train."""
    groups = {folder: len(files) for folder, files in _classes(data).items()}
    counts: dict[str, int] = {}
    for folder, count in groups.items():
        split = folder.parts[0] if folder.parts[0] in SPLITS else "train"
        counts[split] = counts.get(split, 0) + count
    return counts


def some(data: Path, count: int | None, into: Path) -> Path:
    """Some of a folder's images, as many of each class as it has of all; the folder itself where all are wanted.

    Args:
        data: ``CLASS/*.jpg`` or ``{train,val}/CLASS/*.jpg``.
        count: How many, about; ``None`` for all.
        into: Where the folder of links is made, under the same name.
    """
    if count is None:
        return data.resolve()
    groups = _classes(data)
    total = sum(map(len, groups.values()))
    for folder, files in groups.items():
        place = into / data.name / folder
        place.mkdir(parents=True, exist_ok=True)
        for file in files[: max(round(count * len(files) / total), 1)]:
            (place / file.name).symlink_to(file)
    return into / data.name


def _classes(data: Path) -> dict[Path, list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for file in sorted(data.resolve().rglob("*.jpg")):
        groups.setdefault(file.parent.relative_to(data.resolve()), []).append(file)
    if not groups:
        raise SystemExit(f"There are no *.jpg in {data}")
    return groups


def stored(store: Path) -> int:
    """Bytes of the rows in a store."""
    return sum(file.stat().st_size for file in store.rglob("*.safetensors"))


def middle(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(list(values))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, its rows as they come."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def progress(text: str) -> None:
    """Say on stderr what has been done."""
    print(text, file=sys.stderr, flush=True)
