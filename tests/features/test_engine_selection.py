"""Engine selection: the engine with the lowest estimated total time is chosen."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project.errors import DataError
from project.features.engine_options import EngineOption
from project.features.engine_selection import EngineChoice, RateFile, choose, cost, machine_name, matmul_flops, measure
from project.features.engines import EngineName
from project.features.store import Space
from project.models.loading import load_backbone

CPU = torch.device("cpu")
IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
Candidate = tuple[EngineOption, int]
MakeCandidate = Callable[..., Candidate]


class FakeEngine:
    """An engine that computes nothing."""

    tunes_batch_size = False
    single_threaded = False
    batch_size = 4
    prefetch = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 2)


@pytest.fixture
def built() -> list[str]:
    """Names of the engines that were built."""
    return []


@pytest.fixture
def candidate(built: list[str], tmp_path: Path) -> MakeCandidate:
    """Makes an option, and the number of rows missing from its space."""

    def make(
        name: EngineName, missing: int, startup: float = 0.0, error: Exception | None = None, precision: str = "fp32"
    ) -> Candidate:
        def build() -> FakeEngine:
            built.append(name)
            if error:
                raise error
            return FakeEngine()

        return EngineOption(name, precision, Space(tmp_path, {}), startup, build), missing  # type: ignore[arg-type]

    return make


@pytest.fixture
def rates(tmp_path: Path) -> RateFile:
    return RateFile(tmp_path / "rates.json", "a network", CPU)


def select(candidates: list[Candidate], rates: RateFile, flops: int = 1) -> tuple[EngineOption, EngineChoice]:
    options, missing = zip(*candidates, strict=True)
    choice = choose(options, missing, lambda: IMAGES, flops, CPU, rates)
    return options[choice.index], choice


def test_engine_with_all_rows_stored_wins_without_building(
    candidate: MakeCandidate, built: list[str], rates: RateFile
) -> None:
    rates.put("torch fp32", 1e9)
    winner, choice = select([candidate("torch", 10), candidate("compile", 0), candidate("onnxruntime", 1)], rates)
    assert winner.name == "compile" and choice.engine is None
    assert not built


def test_single_candidate_is_not_measured(candidate: MakeCandidate, built: list[str], rates: RateFile) -> None:
    assert select([candidate("torch", 10)], rates)[0].name == "torch"
    assert not built and rates.get("torch fp32") is None


@pytest.mark.parametrize(("stored", "name"), [(0, "onnxruntime"), (990, "torch")])
def test_remaining_time_decides(
    stored: int, name: str, candidate: MakeCandidate, built: list[str], rates: RateFile
) -> None:
    rates.put("torch fp32", 100)
    rates.put("onnxruntime fp32", 1000)
    winner, _ = select([candidate("torch", 1000 - stored), candidate("onnxruntime", 1000)], rates)
    assert winner.name == name
    assert not built, "both rates are known"


def test_startup_time_counts(candidate: MakeCandidate, rates: RateFile) -> None:
    rates.put("torch fp32", 100)
    rates.put("compile fp32", 1000)
    assert select([candidate("torch", 500), candidate("compile", 500, 20.0)], rates)[0].name == "torch"
    assert select([candidate("torch", 5000), candidate("compile", 5000, 20.0)], rates)[0].name == "compile"


def test_engine_that_cannot_be_faster_is_not_built(candidate: MakeCandidate, built: list[str], rates: RateFile) -> None:
    winner, choice = select([candidate("torch", 10), candidate("compile", 10, 20.0)], rates)
    assert winner.name == "torch" and built == ["torch"]
    assert choice.engine is not None, "the measured engine is returned"
    assert "compile fp32 cannot be faster" in choice.reason


def test_engine_that_fails_to_build_is_skipped_with_the_reason(candidate: MakeCandidate, rates: RateFile) -> None:
    broken = candidate("onnxruntime", 10, error=RuntimeError("no operator Foo\nand much more"))
    winner, choice = select([broken, candidate("torch", 10, 0.1)], rates)
    assert winner.name == "torch"
    assert "onnxruntime fp32 cannot be built (RuntimeError: no operator Foo)" in choice.reason


def test_build_error_without_message_is_reported_by_type(candidate: MakeCandidate, rates: RateFile) -> None:
    winner, choice = select([candidate("onnxruntime", 10, error=AssertionError()), candidate("torch", 10, 0.1)], rates)
    assert winner.name == "torch"
    assert "onnxruntime fp32 cannot be built (AssertionError" in choice.reason


def test_first_option_is_returned_if_none_can_be_built(candidate: MakeCandidate, rates: RateFile) -> None:
    error = RuntimeError("no")
    winner, choice = select([candidate("torch", 10, error=error), candidate("compile", 10, error=error)], rates)
    assert winner.name == "torch" and choice.engine is None


def test_data_error_during_measurement_is_raised(candidate: MakeCandidate, rates: RateFile) -> None:
    def images() -> torch.Tensor:
        raise DataError("a.jpg is no image")

    with pytest.raises(DataError, match=r"a\.jpg"):
        choose([candidate("torch", 10)[0], candidate("compile", 10)[0]], [10, 10], images, 1, CPU, rates)


def test_measured_rates_are_saved_and_reused(
    candidate: MakeCandidate, built: list[str], rates: RateFile, tmp_path: Path
) -> None:
    candidates = [candidate("torch", 10**6), candidate("onnxruntime", 10**6)]
    select(candidates, rates)
    assert sorted(built) == ["onnxruntime", "torch"]
    select(candidates, RateFile(tmp_path / "rates.json", "a network", CPU))
    assert len(built) == 2
    assert RateFile(tmp_path / "rates.json", "another network", CPU).get("torch fp32") is None
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"3"),
        *(b'{"KEY": {"torch fp32": "fast"}}', b'{"KEY": {"torch fp32": -1}}', b'{"KEY": [1]}'),
    ],
)
def test_corrupt_rate_file_is_ignored_and_replaced(content: bytes, rates: RateFile, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_bytes(content.replace(b"KEY", f"{machine_name(CPU)}, a network".encode()))
    assert rates.get("torch fp32") is None
    rates.put("torch fp32", 7)
    assert rates.get("torch fp32") == 7


def test_rate_file_creates_the_store_folder(tmp_path: Path) -> None:
    rates = RateFile(tmp_path / "store" / "rates.json", "a network", CPU)
    rates.put("torch fp32", 7)
    assert rates.get("torch fp32") == 7


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_matmul_rate_is_measured_for_each_precision(precision: str) -> None:
    assert matmul_flops(precision, CPU) > 1e6  # type: ignore[arg-type]


def test_measurement_restores_thread_count_and_batch_size() -> None:
    engine, threads = FakeEngine(), torch.get_num_threads()
    assert measure(engine, IMAGES[:1]) > 0
    assert torch.get_num_threads() == threads and engine.batch_size == 4


def test_cost_counts_flops_and_row_shape(resnet18_weights: Path) -> None:
    backbone = load_backbone("resnet18", str(resnet18_weights), 224)
    image = cost(backbone, backbone.cut, CPU)
    assert image.flops == pytest.approx(2 * 1.814e9, rel=0.01)  # torchvision documents 1.81 GFLOPS
    assert image.shape == (512,)
    partial = load_backbone("resnet18", str(resnet18_weights), 32)
    image = cost(partial, partial.cut_at("layer4"), CPU)
    assert image.shape == (256, 2, 2)
