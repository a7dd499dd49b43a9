"""One list of what a name may import, and the flag that adds to it."""

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
from project.config.import_allowlist import allowed_imports, imports_limited, is_importable
from project.errors import ConfigError

Fit = Callable[..., int]


class Mine(nn.Module):
    """A class of the user's."""


@pytest.fixture
def own(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's, with a head."""
    (here / "my_part.py").write_text("from torch import nn\nclass Head(nn.Linear): ...\n")
    monkeypatch.syspath_prepend(here)
    yield "my_part"
    sys.modules.pop("my_part", None)


def test_a_head_of_ones_own_needs_the_flag_and_takes_it(
    own: str, fit: Fit, photos: Path, refused: Callable[[int], str]
) -> None:
    said = refused(fit("--model.head", "my_part.Head"))
    assert "'my_part.Head' is outside" in said and "--allow_imports my_part" in said
    assert "my_part" not in sys.modules
    assert fit("--model.head", "my_part.Head", "--allow_imports", "my_part") == 0
    best = "runs/photos/version_0/checkpoints/best.ckpt"
    validate = ["validate", "--data.root", str(photos), "--ckpt_path", best]
    assert "--allow_imports my_part" in refused(main(validate)), "allowed once is not allowed for ever"
    assert main([*validate, "--allow_imports=my_part"]) == 0


def test_a_config_cannot_allow_itself_more(own: str, fit: Fit, here: Path, refused: Callable[[int], str]) -> None:
    (here / "mine.yaml").write_text("allow_imports: my_part\nmodel: {head: my_part.Head}\n")
    refused(fit("-c", "mine.yaml"))
    assert "my_part" not in sys.modules


@pytest.mark.parametrize("name", ["*", "jsonargparse", "../mine", ""])
def test_what_is_no_package_cannot_be_allowed(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    assert "--allow_imports takes names of packages" in refused(fit("--allow_imports", name))


def test_the_flag_without_a_value(fit: Fit, refused: Callable[[int], str]) -> None:
    assert "--allow_imports needs the name" in refused(fit("--allow_imports"))


def test_it_can_be_said_twice_or_with_a_comma() -> None:
    assert allowed_imports(["fit", "--allow_imports", "a,b", "--x", "1", "--allow_imports=c.d"]) == (
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
def test_the_parser_and_the_reader_of_checkpoints_go_by_the_same_list(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kind", type=type)
    parser.add_argument("--call", type=Callable)
    with imports_limited():
        try:
            parser.parse_args(["--kind", name])
            denied = False
        except Exception as error:
            denied = "is not allowed" in str(error)
        assert denied is not is_importable(name)


def test_on_the_command_line_a_class_is_not_accepted_for_being_imported_already() -> None:
    spec = {"class_path": f"{__name__}.Mine"}
    assert ClassSpec.from_dict(spec).resolve(nn.Module).func is Mine
    with imports_limited(), pytest.raises(ConfigError, match="outside"):
        ClassSpec.from_dict(spec).resolve(nn.Module)


@pytest.mark.parametrize("name", ["torch.fx.GraphModule", "torchmetrics.functional.image.lpips.Vgg16"])
def test_nor_what_libraries_have_imported_in_python(name: str) -> None:
    """The second of these would download its weights."""
    importlib.import_module(name.rpartition(".")[0])
    with pytest.raises(ConfigError, match=r"is outside .*\n.*use it in a class of your own"):
        ClassSpec.from_dict({"class_path": name}).resolve(nn.Module)


def test_nor_for_another_name_of_it_being_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn, "Another", torch.fx.GraphModule, raising=False)
    with imports_limited(), pytest.raises(ConfigError, match=r"'torch\.fx\.graph_module\.GraphModule' is outside"):
        ClassSpec.from_dict({"class_path": "torch.nn.Another"}).resolve(nn.Module)
