"""Which engines are offered, and where the rows of each belong."""

import shutil
import sys
from pathlib import Path

import pytest

from project.errors import ConfigError
from project.features.engine_options import EngineFactory
from project.features.engines import Engine
from project.models.backbone import load_backbone
from tests.features.test_engines import CPU, SOME, relative


@pytest.fixture
def engines(weights: Path, tmp_path: Path) -> EngineFactory:
    backbone = load_backbone("resnet18", str(weights), 32)
    return EngineFactory(tmp_path, backbone, backbone.cut, backbone, CPU, "a task", lambda: SOME, "channels_last")


def build(engines: EngineFactory, name: str, precision: str) -> Engine:
    (option,) = engines.options(name, precision, "32-true")  # type: ignore[arg-type]
    return option.build()


def test_a_compiled_network_agrees_whatever_the_batch(engines: EngineFactory) -> None:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler: there is no g++, clang++ or c++ here")
    exact = build(engines, "torch", "fp32")(SOME)
    compiled = build(engines, "compile", "fp32")
    for count in (8, 5, 1):
        rows = compiled(SOME[:count])
        assert rows.shape == (count, 512)
        assert relative(rows, exact[:count]) < 1e-4


def test_no_engine_touches_the_network_it_copies(engines: EngineFactory, weights: Path) -> None:
    pretrained = load_backbone("resnet18", str(weights), 32)
    loaded, backbone = pretrained.sha256, engines._backbone
    layouts = [parameter.stride() for parameter in backbone.parameters()]
    for name, precision in [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]:
        build(engines, name, precision)(SOME)
        assert backbone.fingerprint(backbone.cut) == loaded
        assert [parameter.stride() for parameter in backbone.parameters()] == layouts
        assert not any(stage.training for stage in backbone.stages.values())


def test_each_precision_and_engine_has_rows_of_its_own(engines: EngineFactory) -> None:
    pairs = [
        ("torch", "fp32"),
        ("torch", "bf16"),
        ("compile", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
    ]
    spaces = [engines.options(*pair, "32-true")[0].space.path for pair in pairs]  # type: ignore[arg-type]
    assert len(set(spaces)) == len(pairs)


def test_a_trainer_in_full_precision_is_offered_nothing_less(engines: EngineFactory) -> None:
    assert {option.precision for option in engines.options("auto", None, "32-true")} == {"fp32"}
    assert [option.precision for option in engines.options("torch", None, "bf16-mixed")] == ["bf16", "fp32"]


def test_what_does_not_go_together_is_told_with_what_does(engines: EngineFactory) -> None:
    with pytest.raises(ConfigError, match="torch has no precision int8 on cpu, but bf16 or fp32"):
        engines.options("torch", "int8", "32-true")
    with pytest.raises(ConfigError, match="onnxruntime has no precision bf16 on cpu, but fp32 or int8"):
        engines.options("onnxruntime", "bf16", "32-true")


def test_without_onnxruntime_the_others_are_offered(engines: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        "project.features.engine_options.find_spec", lambda name: None if name == "onnxscript" else name
    )
    assert {option.name for option in engines.options("auto", None, "32-true")} == {"torch", "compile"}
    assert "onnxruntime is left out, it needs onnxscript: pip install 'frozen-backbone[onnx]'" in engines.left_out
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'frozen-backbone\[onnx\]'"):
        engines.options("onnxruntime", None, "32-true")
