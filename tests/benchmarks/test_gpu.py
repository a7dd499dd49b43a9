"""The GPU benchmark runs on a CPU, small, so that it works when there is a card."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.benchmarks.gpu import __main__ as script
from tests.benchmarks.gpu import promises
from tests.benchmarks.gpu.figures import FigureFile, environment, read_figures, table
from tests.benchmarks.gpu.photographs import generate, repeat
from tests.benchmarks.gpu.scale import Scale, small

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_whole_script_runs_small_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--small", "--json", str(tmp_path / "gpu.json")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0]
    measured = {each["section"] for each in found["figures"]}
    assert measured == set(script.SECTIONS)
    promises = [each for each in found["figures"] if each["holds"] is not None]
    assert len(promises) > 8 and all(each["holds"] for each in promises)
    for each in found["figures"]:
        if each["unit"] == "images/s":
            assert each["value"] > 0, each
            assert f"| {each['name']} |" in ran.stdout


def test_the_sections_together_take_less_than_eight_minutes() -> None:
    assert sum(seconds for _, seconds in script.SECTIONS.values()) <= script.TOTAL <= 8 * 60 - 10


def test_a_section_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scale: Scale, photographs: Path, work: Path, out: FigureFile) -> None:
        out.add("measured before", 7.0, "images/s")
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setitem(script.SECTIONS, "fit", ("broken.fail", 1))
    monkeypatch.setattr(script, "import_module", lambda name: SimpleNamespace(fail=fail))
    assert not script.run_section("fit", small(), tmp_path, tmp_path, tmp_path / "figures.jsonl")
    before, failed, _ = read_figures(tmp_path / "figures.jsonl")
    assert before.value == 7.0
    assert failed.holds is False
    assert failed.note == "RuntimeError: CUDA error: an illegal memory access"
    assert any("FAILS" in line and "illegal" in line for line in table([before, failed], {"card": "none"}))


def test_a_section_whose_process_dies_or_hangs_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"extraction": "import os; os.abort()", "fit": "import time; time.sleep(60)", "config": "pass"}
    start = subprocess.Popen

    def started(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        name = command[command.index("--only") + 1]
        return start([sys.executable, "-c", code[name]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(script.subprocess, "Popen", started)
    for name in code:
        monkeypatch.setitem(script.SECTIONS, name, ("", 1))
    script.run_sections([*code], tmp_path, tmp_path, tmp_path / "figures.jsonl")
    assert [(each.section, each.note) for each in read_figures(tmp_path / "figures.jsonl")] == [
        ("extraction", "its process ended with exit code -6"),
        ("fit", "stopped after 2 s"),
    ]


def test_repeated_photographs_differ_in_bytes_and_not_in_pixels(tmp_path: Path) -> None:
    few = generate(tmp_path / "few", count=2)
    many = repeat(few, tmp_path / "many", train=20, val=7)
    files = sorted((many / "train").rglob("*.jpg"))
    assert len(files) == 20 and len(list((many / "val").rglob("*.jpg"))) == 7
    assert len({file.read_bytes() for file in files}) == 20
    assert len({Image.open(file).tobytes() for file in files}) == 6
    with pytest.raises(FileNotFoundError, match="no JPEG files"):
        repeat(tmp_path, tmp_path / "none", 1, 1)


def test_the_table_names_the_machine() -> None:
    machine = environment(CPU)
    assert machine["card"] == "none (CPU)"
    assert next(iter(table([], machine))).startswith("card none (CPU), driver none")


@pytest.mark.filterwarnings("ignore:model.weights is null")
def test_rows_of_the_networks_that_a_card_is_asked_for_are_compared() -> None:
    found = promises.rows_agree(small(), "bf16", "resnet50", 96)
    assert found.holds("bf16"), found
    assert not promises.Agreement(0.5, 0.0).holds("fp32") and not promises.Agreement(1.0, 0.5).holds("fp32")


def test_what_fails_within_a_section_is_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    out = FigureFile(tmp_path / "figures.jsonl", "promises")
    with out.attempt("compiles"):
        raise RuntimeError("no compiler\nmore")
    out.promise("resumes", True)
    failed, holds = read_figures(tmp_path / "figures.jsonl")
    assert (failed.name, failed.holds, failed.note) == ("compiles", False, "RuntimeError: no compiler")
    assert holds.holds
