"""What holds on a GPU as it does on a CPU; the GPU benchmark measures with the same functions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from project.runtime.system import cores
from tests.benchmarks.gpu import promises
from tests.benchmarks.gpu.finetune import Setting
from tests.benchmarks.gpu.photographs import generate, repeat
from tests.benchmarks.gpu.scale import COMPARED, Scale, full
from tests.benchmarks.gpu.watch import Watch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("default"),  # other versions of the libraries than CI's
]

SCALE = full(cores()).for_promises()
WAYS = promises.resumed_ways(SCALE)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``{train,val}/CLASS/*.jpg``, as many as a fit of these tests takes."""
    root = tmp_path_factory.mktemp("photographs")
    return repeat(generate(root / "few"), root / "many", SCALE.train, SCALE.val)


@pytest.fixture
def scale() -> Iterator[Scale]:
    """The scale of these tests; what a test leaves on the card is freed."""
    yield SCALE
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", promises.CLOSE)
@pytest.mark.parametrize("network", COMPARED)
def test_rows_agree_with_those_of_the_cpu(network: str, precision: str, scale: Scale) -> None:
    found = promises.rows_agree(scale, precision, network, *COMPARED[network])
    assert found.holds(precision), found


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
    holds, sha256 = promises.frozen_is_unchanged(scale, photographs, tmp_path, setting)
    assert holds, (Watch.last.fingerprint, sha256)
    if setting.compiled:
        assert Watch.last.graphs[0] == Watch.last.graphs[-1] > 0, "graphs compiled after the first epoch"


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_fit_resumes_to_the_bit(way: str, scale: Scale, photographs: Path, tmp_path: Path) -> None:
    holds, note = promises.resumes_to_the_bit(scale, photographs, tmp_path, WAYS[way])
    assert holds, note


def test_checkpoints_load_and_resume_on_the_other_device(scale: Scale, photographs: Path, tmp_path: Path) -> None:
    for name, holds, note in promises.checkpoints_cross(scale, photographs, tmp_path):
        assert holds, (name, note)


def test_out_of_memory_is_reported_in_two_lines(scale: Scale, photographs: Path, tmp_path: Path) -> None:
    holds, note = promises.out_of_memory(scale, photographs, tmp_path)
    assert holds, note
