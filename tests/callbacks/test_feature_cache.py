"""Training on cached features, from the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from project import ImageClassifier, ImageDataModule, Trainer, load
from project.callbacks.feature_cache import FeatureCache
from project.cli.main import main
from project.data.sources.base import Sample
from project.data.sources.folder import Folder
from project.features.row_loader import RowBatch
from tests.conftest import BACKBONE, FEATURES, STORED, row_counts, scalars

Fit = Callable[..., int]
Counts = Callable[..., tuple[int, int]]
LIVE = "Features: computed in every epoch, because"
LAST = "checkpoints/last.ckpt"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of training batches: ``rows`` or ``images``."""
    kinds: set[str] = set()
    step = ImageClassifier._step

    def watch(self: ImageClassifier, batch: Any, stage: str) -> Any:
        kinds.add("rows" if isinstance(batch, RowBatch) else "images")
        return step(self, batch, stage)

    monkeypatch.setattr(ImageClassifier, "_step", watch)
    return kinds


def test_rows_are_computed_once_and_reused_by_the_next_fit(
    fit: Fit, here: Path, batches: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert fit("--trainer.max_epochs", "3") == 0
    assert fit() == 0
    out = capsys.readouterr().out
    assert row_counts(out) == [(0, 36), (36, 0)]
    assert "images/s" in out and " fp32" in out
    assert batches == {"rows"}
    assert {path.name for path in (here / "cache").iterdir()} == {"frozen-backbone"}


def test_changed_head_or_learning_rate_reuses_all_rows(rows: Counts) -> None:
    assert rows() == (0, 36)
    assert rows("--model.optimizer.lr", "0.1", "--data.batch_size", "5") == (36, 0)
    head = ["--model.head", "project.models.heads.MLPHead", "--model.label_smoothing", "0.1"]
    assert rows(*head, "--seed_everything", "5") == (36, 0)


def test_numbers_of_reused_and_computed_rows_are_logged(rows: Counts) -> None:
    rows()
    rows()
    for version, expected in enumerate([(0, 36), (36, 0)]):
        logged = scalars(Path(f"runs/photos/version_{version}"))
        values = [logged.Scalars(f"features/rows_{kind}")[0].value for kind in ("reused", "computed")]
        assert tuple(values) == expected


@pytest.mark.parametrize("word", ["off", "false"])
def test_disabled_cache_trains_on_images(
    word: str, fit: Fit, batches: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED[:2], "--features.cache", word) == 0
    assert batches == {"images"} and not Path("store").exists()
    assert "Features:" not in capsys.readouterr().out


@pytest.mark.parametrize(("word", "kind"), [("off", "images"), ("on", "rows"), ("auto", "rows")])
def test_cache_option_accepts_yaml_booleans(word: str, kind: str, fit: Fit, here: Path, batches: set[str]) -> None:
    (here / "features.yaml").write_text(f"features: {{cache: {word}, engine: torch, folder: store}}")
    assert fit("-c", "features.yaml") == 0
    assert batches == {kind}
    assert main(["fit", "-c", "runs/photos/version_0/config.yaml"]) == 0
    assert batches == {kind}, "the run's own config gives the same fit"
    assert yaml.safe_load(Path("runs/photos/version_0/config.yaml").read_text())["features"]["folder"] == "store"


def test_fully_trainable_model_trains_on_images_and_reports_it(
    fit: Fit, batches: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--features.folder", "store", "--model.trainable", "all") == 0
    assert f"{LIVE} model.trainable is all" in capsys.readouterr().out
    assert batches == {"images"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.trainable", "all", "--features.cache", "on"], "model.trainable is all"),
        (["--model.trainable", "all", "--features.views", "2"], "model.trainable is all"),
        (["--model.trainable", "all", "--features.engine", "torch"], "model.trainable is all"),
        (["--features.views", "2"], "without data.augment"),
        (["--features.budget", "1e-6", "--features.cache", "on"], "features.budget"),
        (["--features.views", "0"], "at least 1, not 0"),
        (["--features.budget", "0"], "more than 0 gigabytes, not 0"),
        (["--features.budget", "-2"], "more than 0 gigabytes, not -2"),
        (["--features.precision", "int8", "--features.engine", "torch"], "does not support precision int8"),
        (["--features.engine", "tensorrt"], "features.engine"),
        (["--features.view", "2"], "'--features.views'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_options_are_refused_with_the_reason(
    flags: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit("--features.folder", "store", "--trainer.accelerator", "cpu", *flags))


def test_rows_that_exceed_the_budget_are_not_stored(
    fit: Fit, batches: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--features.folder", "store", "--features.budget", "1e-5") == 0
    out = capsys.readouterr().out
    assert LIVE in out and f"36 rows of {FEATURES}" in out and "features.budget" in out
    assert batches == {"images"} and not list(Path().glob("store/*/*.safetensors"))


def test_fast_dev_run_stores_nothing(fit: Fit, batches: set[str]) -> None:
    assert fit("--features.folder", "store", "--trainer.fast_dev_run", "true") == 0
    assert batches == {"images"} and not Path("store").exists()


def test_partly_frozen_backbone_trains_its_suffix_on_stored_maps(
    rows: Counts, batches: set[str], monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    models: list[ImageClassifier] = []
    monkeypatch.setattr(ImageClassifier, "on_fit_end", lambda self: models.append(self), raising=False)
    assert rows("--model.trainable", "layer4", "--trainer.max_epochs", "2") == (0, 36)
    assert batches == {"rows"}
    pretrained = torch.load(weights, weights_only=True)
    trained = next(models[0].backbone.stages["layer4"].children()).state_dict()
    assert torch.equal(trained["0.bn1.running_mean"], pretrained["layer4.0.bn1.running_mean"]), "BatchNorm is frozen"
    assert not torch.equal(trained["0.conv1.weight"], pretrained["layer4.0.conv1.weight"])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load(f"runs/photos/version_0/{LAST}").model(images), models[0].eval()(images))


def test_stored_and_live_features_reach_the_same_accuracy(fit: Fit) -> None:
    flags = ["--trainer.max_epochs", "8", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert fit(*STORED, *flags) == 0
    assert fit("--features.cache", "off", *flags) == 0
    stored, live = (
        [event.value for event in scalars(Path(f"runs/photos/version_{version}")).Scalars("val/accuracy")][-1]
        for version in range(2)
    )
    assert stored == live == 1.0


def test_stored_and_live_features_give_the_same_losses_in_the_first_epoch(fit: Fit) -> None:
    # A single batch, so that the shuffled order affects only rounding.
    flags = ["--data.batch_size", "36", "--trainer.accelerator", "cpu"]
    assert fit(*STORED[:4], *flags) == 0
    assert fit("--features.cache", "off", *flags) == 0
    for name in ("train/loss", "val/loss"):
        stored, live = (scalars(Path(f"runs/photos/version_{version}")).Scalars(name)[0].value for version in range(2))
        assert stored == pytest.approx(live, rel=1e-5)


def test_mixed_precision_training_uses_stored_rows(fit: Fit, batches: set[str], products: set[torch.dtype]) -> None:
    for trainable in ("head", "layer4"):
        assert fit(*STORED, "--trainer.precision", "bf16-mixed", "--model.trainable", trainable) == 0
        assert batches == {"rows"} and products == {torch.bfloat16}


def test_unavailable_engine_is_reported_with_its_requirements(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("project.features.engine_options.find_spec", lambda name: None)
    assert fit("--features.folder", "store", "--trainer.accelerator", "cpu") == 0
    assert "onnxruntime skipped, needs onnxruntime, onnx, onnxscript: pip install" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "suggestion"), [("bf16-true", "bf16-mixed"), ("16-true", "16-mixed"), ("64-true", "32-true")]
)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_precision_that_converts_frozen_weights_is_refused(
    precision: str, suggestion: str, cache: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    message = refused(fit("--features.cache", cache, "--trainer.precision", precision))
    assert "frozen weights" in message and suggestion in message


def test_other_verbs_use_images_after_a_fit_on_rows(
    rows: Counts, batches: set[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows("--trainer.max_epochs", "2")
    batches.clear()
    common = ["--ckpt_path", f"runs/photos/version_0/{LAST}", "--data.num_workers", "0"]
    assert main(["validate", *common, "--data.root", str(photos)]) == 0
    out = capsys.readouterr().out
    accuracy = scalars(Path("runs/photos/version_0")).Scalars("val/accuracy")[-1].value
    assert f"val/accuracy: {accuracy:.4f}" in out, "equal to the accuracy logged by the fit"
    assert main(["test", *common, "--data.root", str(photos)]) == 0
    assert main(["predict", *common, "--data.predict", str(photos / "test")]) == 0
    assert batches == {"images"}
    assert len(Path("predictions.csv").read_text().splitlines()) == 13


def test_resumed_fit_reuses_stored_rows(rows: Counts) -> None:
    assert rows("--trainer.max_epochs", "2") == (0, 36)
    last = f"runs/photos/version_0/{LAST}"
    assert rows("--ckpt_path", last, "--trainer.max_epochs", "3") == (36, 0)


def test_fingerprint_is_reported_before_and_after_the_fit(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*STORED) == 0
    flat = "".join(character for character in capsys.readouterr().out if character not in "│\n ")
    digits = torch.load(f"runs/photos/version_0/{LAST}", weights_only=True)["transfer"]["frozen"]["sha256"]
    assert flat.count(digits) == 2


def test_fits_with_the_same_seed_are_bit_identical(rows: Counts) -> None:
    for _ in range(2):
        rows("--data.batch_size", "7", "--trainer.max_epochs", "3", "--data.augment", "flip", "--features.views", "2")
    first, second = (
        torch.load(f"runs/photos/version_{version}/{LAST}", weights_only=True)["state_dict"] for version in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_removed_store_is_recomputed(rows: Counts) -> None:
    assert rows() == (0, 36)
    shutil.rmtree("store")
    assert rows() == (0, 36)


def test_fast_dev_run_ignores_required_caching(fit: Fit, batches: set[str]) -> None:
    assert fit(*STORED, "--features.cache", "on", "--trainer.fast_dev_run", "true") == 0
    assert batches == {"images"}


def silent_trainer() -> Trainer:
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FeatureCache(folder="store", engine="torch")],
    )


#: Lightning's warnings about frozen modules and few workers, which only the command line filters.
IGNORE_LIGHTNING_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*module.s. in eval mode", "ignore:.*does not have many workers"
)


@IGNORE_LIGHTNING_WARNINGS
def test_same_trainer_can_fit_validate_and_fit_again(photos: Path, weights: Path, here: Path) -> None:
    model, data = ImageClassifier(BACKBONE, str(weights), image_size=32), ImageDataModule(str(photos), num_workers=0)
    trainer = silent_trainer()
    trainer.fit(model, datamodule=data)
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=data)
    assert trainer.current_epoch == 2


@IGNORE_LIGHTNING_WARNINGS
def test_source_with_another_decoder_has_its_own_rows(photos: Path, weights: Path, here: Path) -> None:
    class Grey(Folder):
        def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
            return super().decode(content, sample).convert("L").convert("RGB")

    for source in (Folder(str(photos)), Grey(str(photos))):
        model = ImageClassifier(BACKBONE, str(weights), image_size=32)
        silent_trainer().fit(model, datamodule=ImageDataModule(source=source, num_workers=0))
    assert len(list(Path("store").rglob("*.safetensors"))) == 2
