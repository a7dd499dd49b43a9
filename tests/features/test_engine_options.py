"""Engine options: which engines and precisions are offered, and the space of each."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch

from project.errors import ConfigError
from project.features.engine_options import EngineFactory
from project.features.engines import Engine
from project.features.frozen_prefix import PrefixSpec
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, FEATURES
from tests.features.test_engines import CPU, IMAGES, relative_error


@pytest.fixture
def prefix(weights: Path) -> PrefixSpec:
    backbone = load_backbone(BACKBONE, str(weights), 32)
    return PrefixSpec(backbone, backbone.cut, backbone, "channels_last", CPU, "32-true")


@pytest.fixture
def engines(prefix: PrefixSpec, tmp_path: Path) -> EngineFactory:
    return EngineFactory(tmp_path, prefix, "a task", lambda: IMAGES)


def build(engines: EngineFactory, name: str, precision: str) -> Engine:
    (option,) = engines.options(name, precision)  # type: ignore[arg-type]
    return option.build()


def test_compiled_engine_agrees_with_exact_engine_for_any_batch_size(engines: EngineFactory) -> None:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler: g++, clang++ or c++")
    exact = build(engines, "torch", "fp32")(IMAGES)
    compiled = build(engines, "compile", "fp32")
    for count in (8, 5, 1):
        rows = compiled(IMAGES[:count])
        assert rows.shape == (count, FEATURES)
        assert relative_error(rows, exact[:count]) < 1e-4


def test_building_an_engine_leaves_the_backbone_unchanged(
    engines: EngineFactory, prefix: PrefixSpec, weights: Path
) -> None:
    backbone = prefix.backbone
    pretrained_sha256 = load_backbone(BACKBONE, str(weights), 32).sha256
    strides = [parameter.stride() for parameter in backbone.parameters()]
    for name, precision in [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]:
        build(engines, name, precision)(IMAGES)
        assert backbone.fingerprint(backbone.cut) == pretrained_sha256
        assert [parameter.stride() for parameter in backbone.parameters()] == strides
        assert not any(stage.training for stage in backbone.stages.values())


def test_each_engine_and_precision_has_its_own_space(engines: EngineFactory) -> None:
    pairs = [
        ("torch", "fp32"),
        ("torch", "bf16"),
        ("compile", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
    ]
    spaces = [engines.options(*pair)[0].space.path for pair in pairs]  # type: ignore[arg-type]
    assert len(set(spaces)) == len(pairs)


def test_row_precision_follows_the_trainer_precision(
    engines: EngineFactory, prefix: PrefixSpec, tmp_path: Path
) -> None:
    assert {option.precision for option in engines.options("auto", None)} == {"fp32"}
    mixed = EngineFactory(tmp_path, dataclasses.replace(prefix, precision="bf16-mixed"), "a task", lambda: IMAGES)
    assert [option.precision for option in mixed.options("torch", None)] == ["bf16", "fp32"]


def test_unsupported_precision_error_lists_supported_ones(engines: EngineFactory) -> None:
    with pytest.raises(ConfigError, match=r"torch does not support precision int8 on cpu\. Supported: bf16 or fp32"):
        engines.options("torch", "int8")
    with pytest.raises(ConfigError, match=r"onnxruntime does not support precision bf16 .*Supported: fp32 or int8"):
        engines.options("onnxruntime", "bf16")


def test_without_onnxruntime_other_engines_are_offered(engines: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        "project.features.engine_options.find_spec", lambda name: None if name == "onnxscript" else name
    )
    assert {option.name for option in engines.options("auto", None)} == {"torch", "compile"}
    assert "onnxruntime skipped, needs onnxscript: pip install 'frozen-backbone[onnx]'" in engines.skipped
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'frozen-backbone\[onnx\]'"):
        engines.options("onnxruntime", None)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_engines_compute_the_features_of_all_stages(prefix: PrefixSpec, tmp_path: Path, name: str) -> None:
    of_last = EngineFactory(tmp_path, prefix, "a task", lambda: IMAGES).options("torch", "fp32")[0].space.path
    prefix.backbone.set_features("stages")
    engines = EngineFactory(tmp_path, prefix, "a task", lambda: IMAGES)
    rows = build(engines, name, "fp32")(IMAGES)
    assert rows.shape == (len(IMAGES), prefix.backbone.feature_dim)
    assert prefix.backbone.feature_dim > FEATURES
    with torch.no_grad():
        assert relative_error(rows, prefix.backbone(IMAGES)) < 1e-4
    assert engines.options("torch", "fp32")[0].space.path != of_last
