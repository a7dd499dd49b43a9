import functools
import json
import sys

import pytest
import torch
from torch import nn

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.heads import LinearHead, MLPHead


class CustomHead(nn.Linear):
    """A class outside the allowed imports, in a module that is already imported."""


@pytest.fixture
def import_marker(tmp_path, monkeypatch):
    """A file that the module ``custom_module`` creates when it is imported."""
    marker = tmp_path / "imported"
    (tmp_path / "custom_module.py").write_text(
        f"import pathlib\nfrom torch import nn\npathlib.Path({str(marker)!r}).touch()\nclass Head(nn.Linear): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    sys.modules.pop("custom_module", None)


@pytest.mark.parametrize("target", [LinearHead, torch.optim.SGD, torch.optim.lr_scheduler.StepLR])
def test_class_survives_a_json_round_trip(target):
    spec = json.loads(json.dumps(ClassSpec.of(target).as_dict()))
    assert spec["init_args"] == {}
    assert ClassSpec.from_dict(spec).resolve(target.__mro__[-2]).func is target


def test_partial_survives_a_json_round_trip():
    spec = json.loads(json.dumps(ClassSpec.of(functools.partial(MLPHead, hidden=16, dropout=0.5)).as_dict()))
    assert spec == {"class_path": "project.models.heads.MLPHead", "init_args": {"hidden": 16, "dropout": 0.5}}
    head = ClassSpec.from_dict(spec).resolve(nn.Module)(8, 3)
    assert isinstance(head, MLPHead)
    assert (head[1].out_features, head[3].p) == (16, 0.5)


def test_partial_of_a_partial_keeps_all_arguments():
    inner = functools.partial(MLPHead, hidden=16)
    assert ClassSpec.of(functools.partial(inner, dropout=0.5)).as_dict()["init_args"] == {"hidden": 16, "dropout": 0.5}


def test_spec_of_a_spec_is_a_copy():
    spec = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    copied = ClassSpec.of(spec).as_dict()
    assert copied == spec
    copied["init_args"]["lr"] = 1.0
    assert spec["init_args"]["lr"] == 0.1
    assert ClassSpec.of({"class_path": "torch.optim.SGD", "init_args": None}).as_dict()["init_args"] == {}


@pytest.mark.parametrize(
    "factory",
    [lambda: None, len, json.dumps, functools.partial(nn.Linear, 8), LinearHead(2, 2), "torch.optim.SGD", None],
)
def test_factory_that_a_checkpoint_cannot_store_is_refused(factory):
    with pytest.raises(
        ConfigError, match=r"cannot be stored in a checkpoint: use a module-level class or functools\.partial"
    ):
        ClassSpec.of(factory).as_dict()


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.functional.linear",
        "torch.optim.SGD",  # not an nn.Module
        "torch.nn.Nowhere",
        "torch.os.system",
    ],
)
def test_path_that_is_not_a_subclass_of_the_base_is_refused(path):
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        ClassSpec.from_dict({"class_path": path}).resolve(nn.Module)


@pytest.mark.parametrize("path", ["", "nn", "LinearHead", "torch."])
def test_path_without_a_class_is_refused(path):
    with pytest.raises(ConfigError, match="class_path"):
        ClassSpec.from_dict({"class_path": path}).resolve(nn.Module)


def test_missing_class_path_is_refused():
    with pytest.raises(ConfigError, match="class_path"):
        ClassSpec.from_dict({}).resolve(nn.Module)


def test_message_names_the_accepted_base_classes():
    with pytest.raises(ConfigError, match=r"'torch\.nn\.Linear' is not a Optimizer or LRScheduler\."):
        ClassSpec.from_dict({"class_path": "torch.nn.Linear"}).resolve(
            (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        )


def test_unlisted_module_is_not_imported(import_marker):
    message = r"'custom_module\.Head' is outside the allowed imports: project, torch(?s:.)*import its module"
    with pytest.raises(ConfigError, match=message):
        ClassSpec.from_dict({"class_path": "custom_module.Head"}).resolve(nn.Module)
    assert not import_marker.exists()
    assert "custom_module" not in sys.modules


def test_unlisted_module_that_the_caller_imported_is_accepted(import_marker):
    import custom_module

    assert import_marker.exists(), "the marker of the test above works"
    assert ClassSpec.from_dict({"class_path": "custom_module.Head"}).resolve(nn.Module).func is custom_module.Head


def test_unlisted_class_of_an_imported_module_is_resolved():
    assert ClassSpec.of(CustomHead).resolve(nn.Module).func is CustomHead


def test_failing_import_is_a_user_error():
    with pytest.raises(ConfigError, match=r"'torch\.nn\.nowhere\.Head' cannot be imported: No module named"):
        ClassSpec.from_dict({"class_path": "torch.nn.nowhere.Head"}).resolve(nn.Module)
