"""Smoke tests of the GPU benchmark on a CPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.benchmarks.gpu import __main__ as benchmark
from tests.benchmarks.gpu import correctness
from tests.benchmarks.gpu.figures import FigureFile, environment, read_figures, table
from tests.benchmarks.gpu.photographs import generate, repeat
from tests.benchmarks.gpu.scale import Scale, small

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.long  # each section imports the libraries in its own process
def test_all_sections_run_at_small_scale_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--small", "--json", str(tmp_path / "gpu.json")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert {figure["section"] for figure in report["figures"]} == set(benchmark.SECTIONS)
    checks = [figure for figure in report["figures"] if figure["holds"] is not None]
    assert len(checks) > 8 and all(check["holds"] for check in checks)
    for figure in report["figures"]:
        if figure["unit"] == "images/s":
            assert figure["value"] > 0, figure
            assert f"| {figure['name']} |" in process.stdout


def test_time_limits_add_up_to_less_than_eight_minutes() -> None:
    assert sum(seconds for _, seconds in benchmark.SECTIONS.values()) <= benchmark.TOTAL <= 8 * 60 - 10


def test_failing_section_is_reported_and_keeps_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
        out.add("measured before", 7.0, "images/s")
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setitem(benchmark.SECTIONS, "fit", ("broken.fail", 1))
    monkeypatch.setattr(benchmark, "import_module", lambda name: SimpleNamespace(fail=fail))
    assert not benchmark.run_section("fit", small(), tmp_path, tmp_path, tmp_path / "figures.jsonl")
    before, failed, _ = read_figures(tmp_path / "figures.jsonl")
    assert before.value == 7.0
    assert failed.holds is False
    assert failed.note == "RuntimeError: CUDA error: an illegal memory access"
    assert any("FAILS" in line and "illegal" in line for line in table([before, failed], {"card": "none"}))


def test_crashing_or_hanging_section_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"extraction": "import os; os.abort()", "fit": "import time; time.sleep(60)", "config": "pass"}
    popen = subprocess.Popen

    def run_code(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        name = command[command.index("--only") + 1]
        return popen([sys.executable, "-c", code[name]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(benchmark.subprocess, "Popen", run_code)
    for name in code:
        monkeypatch.setitem(benchmark.SECTIONS, name, ("", 1))
    benchmark.run_sections([*code], tmp_path, tmp_path, tmp_path / "figures.jsonl")
    assert [(figure.section, figure.note) for figure in read_figures(tmp_path / "figures.jsonl")] == [
        ("extraction", "exit code -6"),
        ("fit", "timed out after 2 s"),
    ]


def test_repeated_photographs_differ_in_bytes_but_not_in_pixels(tmp_path: Path) -> None:
    original = generate(tmp_path / "original", count=2)
    repeated = repeat(original, tmp_path / "repeated", train=20, val=7)
    files = sorted((repeated / "train").rglob("*.jpg"))
    assert len(files) == 20 and len(list((repeated / "val").rglob("*.jpg"))) == 7
    assert len({file.read_bytes() for file in files}) == 20
    assert len({Image.open(file).tobytes() for file in files}) == 6
    with pytest.raises(FileNotFoundError, match="No JPEG files"):
        repeat(tmp_path, tmp_path / "none", 1, 1)


def test_table_starts_with_the_environment() -> None:
    machine = environment(CPU)
    assert machine["card"] == "none (CPU)"
    assert next(iter(table([], machine))).startswith("card none (CPU), driver none")


@pytest.mark.filterwarnings("ignore:model.weights is null")
def test_rows_in_bf16_agree_within_tolerance() -> None:
    agreement = correctness.compare_rows(small(), "bf16", "resnet50", 96)
    assert agreement.holds("bf16"), agreement
    assert not correctness.Agreement(0.5, 0.0).holds("fp32"), "low cosine similarity"
    assert not correctness.Agreement(1.0, 0.5).holds("fp32"), "large difference"


def test_failure_within_a_section_is_recorded_and_the_section_continues(tmp_path: Path) -> None:
    out = FigureFile(tmp_path / "figures.jsonl", "correctness")
    with out.record_failure("compiles"):
        raise RuntimeError("no compiler\nmore")
    out.check("resumes", True)
    failed, passed = read_figures(tmp_path / "figures.jsonl")
    assert (failed.name, failed.holds, failed.note) == ("compiles", False, "RuntimeError: no compiler")
    assert passed.holds
