"""Load test of ``serve`` on this machine, and the throughput of ``predict`` in the same run.

    python -m tests.benchmarks.serving --data DIR --seconds 60

``DIR`` contains the data set ``flowers5``, with ``{train,val}/CLASS/*.jpg``. A fit gives a classifier with
EfficientNet-Lite0. ``predict`` classifies a few copies of the photographs, then many: the difference of the times is
that of the further images, without the start of the process. Then a client keeps ``--connections`` requests in progress
for ``--seconds``, while hostile uploads arrive. The client shares the cores with the server; its CPU time is printed.
``predict`` is measured before and after the load.

``--litserve`` also measures a server with LitServe (``pip install litserve``), which runs the same function.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.load_client import Load, form, hostile, once, raw, saturate
from tests.benchmarks.measure import LITE0, ROOT, print_table, progress, run_fit, run_module, subset

COPIES = (2, 6)  # of the photographs for predict: few, but so many that an engine is worth its start; and many
WARM_UP = 5.0  # seconds
PAUSE = 0.5  # seconds between two hostile uploads


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data set flowers5")
    parser.add_argument("--seconds", type=float, default=60, help="duration of the load")
    parser.add_argument("--connections", type=int, default=32, help="requests in progress")
    parser.add_argument("--images", type=int, help="approximate number of photographs; default: all")
    parser.add_argument("--serve", default="", help="further flags of serve, in quotes")
    parser.add_argument("--predict", default="", help="further flags of predict, in quotes")
    parser.add_argument("--litserve", action="store_true", help="measure LitServe, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = subset(options.data.resolve() / "flowers5", options.images, folder)
        photographs = sorted(data.rglob("*.jpg"))
        flags = [*LITE0, "--trainer.max_epochs", 0, "--dashboard.figures", "false"]
        run_fit(data, folder / "store", *flags, "--trainer.default_root_dir", folder / "runs")
        checkpoint = folder / "runs/flowers5/version_0/checkpoints/best.ckpt"
        folders = copies(photographs, folder)
        progress("fit has ended")
        rates = [predict_rate(checkpoint, folders, len(photographs), options.predict)]
        ours = ["project", "serve", "--ckpt_path", checkpoint, "--port", 0, *shlex.split(options.serve)]
        servers = {"serve": ours}
        if options.litserve:
            servers["LitServe"] = ["tests.benchmarks.litserve_server", "--ckpt_path", checkpoint]
        # LitServe reads forms only.
        requests = [
            (form if options.litserve or index % 2 else raw)(path.read_bytes())
            for index, path in enumerate(photographs)
        ]
        rows, attacks = [], hostile(photographs[0].read_bytes())
        for name, command in servers.items():
            with server(command) as (process, port):
                rows.append([name, *asyncio.run(measure(process.pid, port, requests, options, {}))])
                if name == "serve":
                    cells = asyncio.run(measure(process.pid, port, requests, options, attacks))
                    rows.append(["serve, hostile uploads", *cells])
        rates.append(predict_rate(checkpoint, folders, len(photographs), options.predict))
    mean = sum(rates) / len(rates)
    progress(f"predict: {rates[0]:.1f} and {rates[1]:.1f} images/s before and after")
    for row in rows:
        row.insert(2, f"{float(row[1]) / mean:.2f}")
    header = ["images/s", "of predict", "p50 ms", "p95 ms", "MB before", "MB after", "largest MB", "cores of client"]
    print_table([f"{options.connections} connections, {options.seconds:.0f} s", *header], rows)


def copies(photographs: list[Path], folder: Path) -> list[Path]:
    """Two folders of different numbers of copies of the photographs."""
    folders = [folder / "few", folder / "many"]
    for target, count in zip(folders, COPIES, strict=True):
        target.mkdir()
        for copy in range(count):
            for number, path in enumerate(photographs):
                (target / f"{copy}-{number}.jpg").symlink_to(path)
    return folders


def predict_rate(checkpoint: Path, folders: list[Path], count: int, flags: str) -> float:
    """Images per second of ``predict``, without its start and without stored rows."""
    seconds = []
    for folder in (folders[0], *folders):  # the first run measures the engines
        command = ["project", "predict", "--ckpt_path", checkpoint, "--images", folder, *shlex.split(flags)]
        command += ["--features.folder", folder.parent / "no-rows"]
        command += ["--output", folder.parent / "predictions.csv", "--trainer.enable_progress_bar", "false"]
        seconds.append(run_module(*command).seconds)
    rate = (COPIES[1] - COPIES[0]) * count / (seconds[2] - seconds[1])
    progress(f"predict: {rate:.1f} images/s")
    return rate


@contextmanager
def server(arguments: list[object]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server process and its port, once it is ready; stopped by SIGTERM."""
    command = [sys.executable, "-u", "-m", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    port = 0
    try:
        for line in process.stdout:
            progress(line.strip())
            match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            port = int(match[1]) if match else port
            if "ready" in line:
                break
        if process.poll() is not None:
            raise RuntimeError(f"{shlex.join(command)} exited with code {process.returncode}")
        yield process, port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def measure(
    pid: int, port: int, requests: list[bytes], options: argparse.Namespace, attacks: dict[str, bytes]
) -> list[str]:
    """Cells of a server: its throughput, latency and memory under load."""
    await saturate(port, requests, options.connections, WARM_UP)
    before, memory = resident(pid), [resident(pid)]
    answers: Counter[tuple[str, int, str]] = Counter()

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.2)
            memory.append(resident(pid))

    async def attack(until: float) -> None:
        while attacks and time.perf_counter() < until:
            for kind, request in attacks.items():
                status, answer = await once(port, request)
                answers[kind, status, answer["error"]] += 1
                await asyncio.sleep(PAUSE)

    watching = asyncio.create_task(watch())
    attacking = asyncio.create_task(attack(time.perf_counter() + options.seconds))
    load: Load = await saturate(port, requests, options.connections, options.seconds)
    watching.cancel()
    await attacking
    if attacks:
        rows = [[kind, str(number), str(status), error] for (kind, status, error), number in answers.items()]
        print_table(["hostile upload", "number", "status", "error"], rows)
        status, answer = await once(port, requests[0])
        progress(f"afterwards: status {status}, {answer}")
    await asyncio.sleep(1)
    progress(f"statuses under load: {dict(load.statuses)}")
    cells = [f"{load.rate:.1f}", f"{load.percentile(50):.0f}", f"{load.percentile(95):.0f}"]
    memories = [f"{value:.0f}" for value in (before, resident(pid), max(memory))]
    return [*cells, *memories, f"{load.cpu / load.wall:.2f}"]


def resident(pid: int) -> float:
    """Resident memory in MB of a process group."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid:  # process group
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total / 1e6


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    progress(f"{time.perf_counter() - start:.0f} s")
