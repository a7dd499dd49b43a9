"""The import allowlist and ``--allow_imports``."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from project.cli.main import main
from project.config.class_path import ClassSpec
from project.config.import_allowlist import is_importable, restricted_imports, split_allow_imports
from project.errors import ConfigError

Fit = Callable[..., int]


class CustomModule(nn.Module):
    """A class outside the allowlist."""


@pytest.fixture
def custom_head(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Class path of a head in a module outside the allowlist."""
    (here / "my_part.py").write_text("from torch import nn\nclass Head(nn.Linear): ...\n")
    monkeypatch.syspath_prepend(here)
    yield "my_part.Head"
    sys.modules.pop("my_part", None)


def test_custom_head_needs_the_flag_in_every_command(
    custom_head: str, fit: Fit, photos: Path, refused: Callable[[int], str]
) -> None:
    message = refused(fit("--model.head", custom_head))
    assert "'my_part.Head' is outside" in message and "--allow_imports my_part" in message
    assert "my_part" not in sys.modules
    assert fit("--model.head", custom_head, "--allow_imports", "my_part") == 0
    best = "runs/photos/version_0/checkpoints/best.ckpt"
    validate = ["validate", "--data.root", str(photos), "--ckpt_path", best]
    assert "--allow_imports my_part" in refused(main(validate)), "the flag holds for one command only"
    assert main([*validate, "--allow_imports=my_part"]) == 0


def test_config_cannot_extend_the_allowlist(
    custom_head: str, fit: Fit, here: Path, refused: Callable[[int], str]
) -> None:
    (here / "mine.yaml").write_text("allow_imports: my_part\nmodel: {head: my_part.Head}\n")
    refused(fit("-c", "mine.yaml"))
    assert "my_part" not in sys.modules


@pytest.mark.parametrize("name", ["*", "jsonargparse", "../mine", ""])
def test_invalid_package_names_are_refused(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    assert "--allow_imports takes package names" in refused(fit("--allow_imports", name))


def test_flag_without_a_value_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert "--allow_imports needs the name" in refused(fit("--allow_imports"))


def test_flag_can_be_repeated_or_take_a_list() -> None:
    assert split_allow_imports(["fit", "--allow_imports", "a,b", "--x", "1", "--allow_imports=c.d"]) == (
        ["a", "b", "c.d"],
        ["fit", "--x", "1"],
    )


NAMES = ["torch.optim.SGD", "torch.nn.Linear", "torchvision.ops.MLP", "timm.layers.Mlp", "project.models.heads.MLPHead"]
NAMES += ["torchvision.datasets.LSUN", "torchvision.datasets.lsun.LSUNClass", "torchmetrics.image.lpip.Vgg16"]
NAMES += ["torch.load", "torch.hub.load", "torchvision.models.resnet18", "torchvision.datasets.utils.extract_archive"]
NAMES += [
    "torch.ops.load_library",
    "lightning.pytorch.cli.LightningCLI",
    "torch.nnx.Linear",
    "os.system",
    "collections.Counter",
]


@pytest.mark.parametrize("name", NAMES)
def test_parser_and_checkpoint_reader_use_the_same_list(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kind", type=type)
    parser.add_argument("--call", type=Callable)
    with restricted_imports():
        try:
            parser.parse_args(["--kind", name])
            denied = False
        except Exception as error:
            denied = "is not allowed" in str(error)
        assert denied is not is_importable(name)


def test_command_line_refuses_unlisted_classes_of_imported_modules() -> None:
    spec = {"class_path": f"{__name__}.CustomModule"}
    assert ClassSpec.from_dict(spec).resolve(nn.Module).func is CustomModule
    with restricted_imports(), pytest.raises(ConfigError, match="outside"):
        ClassSpec.from_dict(spec).resolve(nn.Module)


@pytest.mark.parametrize("name", ["torch.fx.GraphModule", "torchmetrics.functional.image.lpips.Vgg16"])
def test_unlisted_classes_of_listed_libraries_are_refused_in_python(name: str) -> None:
    """The second one would download weights."""
    importlib.import_module(name.rpartition(".")[0])
    with pytest.raises(ConfigError, match=r"is outside .*\n.*wrap it in a class of your own"):
        ClassSpec.from_dict({"class_path": name}).resolve(nn.Module)


def test_alias_of_an_unlisted_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "Another", torch.fx.GraphModule, raising=False)
    with restricted_imports(), pytest.raises(ConfigError, match=r"'torch\.fx\.graph_module\.GraphModule' is outside"):
        ClassSpec.from_dict({"class_path": "torch.nn.Another"}).resolve(nn.Module)
