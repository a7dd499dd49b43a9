"""Correctness on a GPU, with the functions of the GPU benchmark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from project.runtime.system import cores
from tests.benchmarks.gpu import correctness
from tests.benchmarks.gpu.finetune import Setting
from tests.benchmarks.gpu.monitor import FitMonitor
from tests.benchmarks.gpu.photographs import generate, repeat
from tests.benchmarks.gpu.scale import COMPARED, Scale, full

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # a GPU machine may have other library versions than CI
]

SCALE = full(cores()).for_correctness()
RESUME_FLAGS = correctness.resume_flags(SCALE)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``{train,val}/CLASS/*.jpg`` of the size that the fits of these tests use."""
    root = tmp_path_factory.mktemp("photographs")
    return repeat(generate(root / "generated"), root / "repeated", SCALE.train, SCALE.val)


@pytest.fixture
def scale() -> Iterator[Scale]:
    """The scale of these tests; frees unused GPU memory after each test."""
    yield SCALE
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", correctness.TOLERANCES)
@pytest.mark.parametrize("network", COMPARED)
def test_rows_agree_with_those_of_the_cpu(network: str, precision: str, scale: Scale) -> None:
    agreement = correctness.compare_rows(scale, precision, network, *COMPARED[network])
    assert agreement.holds(precision), agreement


@pytest.mark.parametrize(
    "setting",
    [
        Setting("layer4", "bf16-mixed"),
        Setting("layer4", "16-mixed"),
        Setting("layer4", "bf16-mixed", compiled=True),
    ],
    ids=str,
)
def test_frozen_stages_are_bit_identical_after_fit(
    setting: Setting, scale: Scale, photographs: Path, tmp_path: Path
) -> None:
    holds, sha256 = correctness.check_frozen_fingerprint(scale, photographs, tmp_path, setting)
    assert holds, (FitMonitor.last.fingerprint, sha256)
    if setting.compiled:
        graphs = FitMonitor.last.graphs
        assert graphs[0] == graphs[-1] > 0, "graphs compiled after the first epoch"


@pytest.mark.parametrize("name", RESUME_FLAGS)
def test_killed_fit_resumes_bit_identically(name: str, scale: Scale, photographs: Path, tmp_path: Path) -> None:
    holds, note = correctness.check_exact_resume(scale, photographs, tmp_path, RESUME_FLAGS[name])
    assert holds, note


def test_checkpoints_load_and_resume_on_the_other_device(scale: Scale, photographs: Path, tmp_path: Path) -> None:
    for name, holds, note in correctness.check_device_transfer(scale, photographs, tmp_path):
        assert holds, (name, note)


def test_out_of_memory_is_reported_in_two_lines(scale: Scale, photographs: Path, tmp_path: Path) -> None:
    holds, note = correctness.check_out_of_memory(scale, photographs, tmp_path)
    assert holds, note
