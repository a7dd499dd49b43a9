import functools
import json
import sys

import pytest
import torch
from torch import nn

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.heads import LinearHead, MLPHead


class OwnHead(nn.Linear):
    """A class outside the packages that may be imported, in a module that has been imported already."""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "stranger_part.py").write_text(
        f"import pathlib\nfrom torch import nn\npathlib.Path({str(mark)!r}).touch()\nclass Head(nn.Linear): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("stranger_part", None)


@pytest.mark.parametrize("target", [LinearHead, torch.optim.SGD, torch.optim.lr_scheduler.StepLR])
def test_class_comes_back_from_its_description(target):
    spec = json.loads(json.dumps(ClassSpec.of(target).as_dict()))
    assert spec["init_args"] == {}
    assert ClassSpec.from_dict(spec).resolve(target.__mro__[-2]).func is target


def test_partial_comes_back_with_its_arguments():
    spec = json.loads(json.dumps(ClassSpec.of(functools.partial(MLPHead, hidden=16, dropout=0.5)).as_dict()))
    assert spec == {"class_path": "project.models.heads.MLPHead", "init_args": {"hidden": 16, "dropout": 0.5}}
    head = ClassSpec.from_dict(spec).resolve(nn.Module)(8, 3)
    assert isinstance(head, MLPHead)
    assert (head[1].out_features, head[3].p) == (16, 0.5)


def test_partial_of_a_partial_keeps_all_arguments():
    inner = functools.partial(MLPHead, hidden=16)
    assert ClassSpec.of(functools.partial(inner, dropout=0.5)).as_dict()["init_args"] == {"hidden": 16, "dropout": 0.5}


def test_description_of_a_description_is_a_copy_of_it():
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
def test_what_a_checkpoint_could_not_bring_back_is_refused(factory):
    with pytest.raises(
        ConfigError, match=r"cannot be kept in a checkpoint: use a class of a module, or functools\.partial"
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
        "torch.optim.SGD",  # a class, of another kind than asked for
        "torch.nn.Nowhere",
        "torch.os.system",
    ],
)
def test_what_is_not_a_class_of_the_kind_asked_for_is_refused(path):
    with pytest.raises(ConfigError, match=path.replace(".", r"\.")):
        ClassSpec.from_dict({"class_path": path}).resolve(nn.Module)


@pytest.mark.parametrize("path", ["", "nn", "LinearHead", "torch."])
def test_a_name_without_a_class_is_refused(path):
    with pytest.raises(ConfigError, match="class_path"):
        ClassSpec.from_dict({"class_path": path}).resolve(nn.Module)


def test_no_class_path_is_refused():
    with pytest.raises(ConfigError, match="class_path"):
        ClassSpec.from_dict({}).resolve(nn.Module)


def test_message_names_the_kinds_that_would_do():
    with pytest.raises(ConfigError, match=r"'torch\.nn\.Linear' is not a Optimizer or LRScheduler\."):
        ClassSpec.from_dict({"class_path": "torch.nn.Linear"}).resolve(
            (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        )


def test_a_stranger_module_is_not_imported(stranger):
    with pytest.raises(ConfigError, match=r"'stranger_part\.Head' is outside project, torch(?s:.)*import its module"):
        ClassSpec.from_dict({"class_path": "stranger_part.Head"}).resolve(nn.Module)
    assert not stranger.exists()
    assert "stranger_part" not in sys.modules


def test_a_stranger_module_that_the_caller_imported_is_taken(stranger):
    import stranger_part

    assert stranger.exists()  # so the mark of the test above would have been seen
    assert ClassSpec.from_dict({"class_path": "stranger_part.Head"}).resolve(nn.Module).func is stranger_part.Head


def test_own_class_goes_there_and_back():
    assert ClassSpec.of(OwnHead).resolve(nn.Module).func is OwnHead


def test_module_that_cannot_be_imported_is_a_plain_message():
    with pytest.raises(ConfigError, match=r"'torch\.nn\.nowhere\.Head' cannot be imported: No module named"):
        ClassSpec.from_dict({"class_path": "torch.nn.nowhere.Head"}).resolve(nn.Module)
