"""The engine that is chosen is the one that has all rows soonest."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project.errors import DataError
from project.features.engine_options import EngineOption
from project.features.engine_selection import EngineChoice, RateFile, ceiling, choose, cost, machine, measure
from project.features.engines import EngineName
from project.features.store import Space
from project.models.backbone import load_backbone

CPU = torch.device("cpu")
IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
Built = list[str]
Candidate = Callable[..., tuple[EngineOption, int]]


class Fake:
    """An engine that does nothing."""

    grows = False
    side_by_side = False
    batch_size = 4
    ahead = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 2)


@pytest.fixture
def built() -> Built:
    """Names of the engines that were built."""
    return []


@pytest.fixture
def candidate(built: Built, tmp_path: Path) -> Candidate:
    """Makes an option, with how many rows its space lacks."""

    def make(
        name: EngineName, missing: int, startup: float = 0.0, error: Exception | None = None, precision: str = "fp32"
    ) -> tuple[EngineOption, int]:
        def build() -> Fake:
            built.append(name)
            if error:
                raise error
            return Fake()

        return EngineOption(name, precision, Space(tmp_path, {}), startup, build), missing  # type: ignore[arg-type]

    return make


@pytest.fixture
def rates(tmp_path: Path) -> RateFile:
    return RateFile(tmp_path / "rates.json", "a network", CPU)


def chosen(
    candidates: list[tuple[EngineOption, int]], rates: RateFile, flops: int = 1
) -> tuple[EngineOption, EngineChoice]:
    options, missing = zip(*candidates, strict=True)
    choice = choose(options, missing, lambda: IMAGES, flops, CPU, rates)
    return options[choice.index], choice


def test_an_engine_whose_rows_are_all_stored_wins_and_nothing_is_built(
    candidate: Candidate, built: Built, rates: RateFile
) -> None:
    rates.put("torch fp32", 1e9)
    winner, choice = chosen([candidate("torch", 10), candidate("compile", 0), candidate("onnxruntime", 1)], rates)
    assert winner.name == "compile" and choice.engine is None
    assert not built


def test_one_alone_is_not_measured(candidate: Candidate, built: Built, rates: RateFile) -> None:
    assert chosen([candidate("torch", 10)], rates)[0].name == "torch"
    assert not built and rates.get("torch fp32") is None


@pytest.mark.parametrize(("stored", "name"), [(0, "onnxruntime"), (990, "torch")])
def test_the_whole_time_that_is_left_decides(
    stored: int, name: str, candidate: Candidate, built: Built, rates: RateFile
) -> None:
    rates.put("torch fp32", 100)
    rates.put("onnxruntime fp32", 1000)
    winner, _ = chosen([candidate("torch", 1000 - stored), candidate("onnxruntime", 1000)], rates)
    assert winner.name == name
    assert not built, "both rates are known"


def test_a_long_start_has_to_pay(candidate: Candidate, rates: RateFile) -> None:
    rates.put("torch fp32", 100)
    rates.put("compile fp32", 1000)
    assert chosen([candidate("torch", 500), candidate("compile", 500, 20.0)], rates)[0].name == "torch"
    assert chosen([candidate("torch", 5000), candidate("compile", 5000, 20.0)], rates)[0].name == "compile"


def test_an_engine_that_cannot_pay_is_not_even_built(candidate: Candidate, built: Built, rates: RateFile) -> None:
    winner, choice = chosen([candidate("torch", 10), candidate("compile", 10, 20.0)], rates)
    assert winner.name == "torch" and built == ["torch"]
    assert choice.engine is not None, "what was built to be measured is used"
    assert "compile fp32 could not pay" in choice.reason


def test_an_engine_that_cannot_be_built_is_left_out_with_its_reason(candidate: Candidate, rates: RateFile) -> None:
    broken = candidate("onnxruntime", 10, error=RuntimeError("no operator Foo\nand much more"))
    winner, choice = chosen([broken, candidate("torch", 10, 0.1)], rates)
    assert winner.name == "torch"
    assert "onnxruntime fp32 cannot be built (RuntimeError: no operator Foo)" in choice.reason


def test_an_error_without_words_is_a_reason_too(candidate: Candidate, rates: RateFile) -> None:
    winner, choice = chosen([candidate("onnxruntime", 10, error=AssertionError()), candidate("torch", 10, 0.1)], rates)
    assert winner.name == "torch"
    assert "onnxruntime fp32 cannot be built (AssertionError" in choice.reason


def test_where_none_can_be_built_the_preferred_is_left_to_fail_by_itself(candidate: Candidate, rates: RateFile) -> None:
    error = RuntimeError("no")
    winner, choice = chosen([candidate("torch", 10, error=error), candidate("compile", 10, error=error)], rates)
    assert winner.name == "torch" and choice.engine is None


def test_a_mistake_in_the_data_is_no_reason_against_an_engine(candidate: Candidate, rates: RateFile) -> None:
    def images() -> torch.Tensor:
        raise DataError("a.jpg is no image")

    with pytest.raises(DataError, match=r"a\.jpg"):
        choose([candidate("torch", 10)[0], candidate("compile", 10)[0]], [10, 10], images, 1, CPU, rates)


def test_rates_are_remembered_and_not_measured_twice(
    candidate: Candidate, built: Built, rates: RateFile, tmp_path: Path
) -> None:
    candidates = [candidate("torch", 10**6), candidate("onnxruntime", 10**6)]
    chosen(candidates, rates)
    assert sorted(built) == ["onnxruntime", "torch"]
    chosen(candidates, RateFile(tmp_path / "rates.json", "a network", CPU))
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
def test_damaged_rates_are_measured_again(content: bytes, rates: RateFile, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_bytes(content.replace(b"KEY", f"{machine(CPU)}, a network".encode()))
    assert rates.get("torch fp32") is None
    rates.put("torch fp32", 7)
    assert rates.get("torch fp32") == 7


def test_rates_of_a_new_store_are_remembered(tmp_path: Path) -> None:
    rates = RateFile(tmp_path / "store" / "rates.json", "a network", CPU)
    rates.put("torch fp32", 7)
    assert rates.get("torch fp32") == 7


def test_no_file_remembers_nothing() -> None:
    rates = RateFile(None, "a network", CPU)
    rates.put("torch fp32", 7)
    assert rates.get("torch fp32") is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_machine_has_a_ceiling(precision: str) -> None:
    assert ceiling(precision, CPU) > 1e6  # type: ignore[arg-type]


def test_a_measurement_leaves_the_threads_and_the_batch_as_they_were() -> None:
    engine, threads = Fake(), torch.get_num_threads()
    assert measure(engine, IMAGES[:1]) > 0
    assert torch.get_num_threads() == threads and engine.batch_size == 4


def test_what_an_image_costs_is_counted(weights: Path) -> None:
    backbone = load_backbone("resnet18", str(weights), 224)
    assert cost(backbone, backbone.cut, CPU).flops == pytest.approx(2 * 1.814e9, rel=0.01)  # torchvision: 1.81 GFLOPS
    assert cost(backbone, backbone.cut, CPU).shape == (512,)
    partial = load_backbone("resnet18", str(weights), 32)
    cut = partial.cut_at("layer4")
    assert cost(partial, cut, CPU).shape == (256, 2, 2) and cost(partial, cut, CPU).elements == 1024
