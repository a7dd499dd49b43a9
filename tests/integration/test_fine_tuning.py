"""Averaged weights, frozen BatchNorm and L2-SP in fits that train stages of the backbone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from project import ImageClassifier, ImageDataModule, Trainer, load
from project.cli.main import main
from project.models.backbone import Backbone
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, STORED, scalars

Fit = Callable[..., int]
PARTIAL = [*STORED, "--model.trainable", "layer4", "--data.batch_size", "8", "--model.ema", "0.9"]
ADAMW = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.003"]
SPOILED = ["--allow_imports", "tests", "--trainer.callbacks", "tests.integration.test_fine_tuning.SpoilRawWeights"]
RUN = Path("runs/photos/version_0")


class SpoilRawWeights(pl.Callback):
    """Gives the raw weights a low accuracy at the end of each epoch, so that their average is better."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._negate(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            self._negate(pl_module)

    def _negate(self, module: pl.LightningModule) -> None:
        assert isinstance(module, ImageClassifier)
        for parameter in module.head.parameters():
            parameter.data.neg_()


def read(name: str = "last", run: Path = RUN) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)
    return checkpoint


def values(name: str, run: Path = RUN) -> list[float]:
    return [event.value for event in scalars(run).Scalars(name)]


def test_average_is_a_candidate_for_best_and_the_fit_resumes_from_it_exactly(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*PARTIAL, *ADAMW, *SPOILED, "--trainer.max_epochs", "3"]
    assert fit(*flags) == 0
    out = capsys.readouterr().out
    raw, average = values("val/accuracy"), values("val_ema/accuracy")
    assert len(raw) == len(average) == len(values("val_ema/loss")) == 3
    best, last = read("best"), read()
    assert best["transfer"]["weights"] == "ema" and last["transfer"]["weights"] == "raw"
    assert best["best"]["weights"] == "ema"
    assert best["best"]["metrics"]["val/accuracy"] == max(average) > max(raw)
    assert "from 6 validations, so it is optimistic" in out
    assert "weights: moving average (model.ema)" in " ".join(out.split())
    card = (RUN / "model_card.md").read_text()
    assert "of the moving average of the weights" in card and "exponential moving average, decay 0.9" in card

    assert load(RUN / "checkpoints/best.ckpt").classes_ == ["blue", "green", "red"]
    for name, accuracy in (("best", max(average)), ("last", raw[-1])):
        assert main(["validate", "--ckpt_path", str(RUN / f"checkpoints/{name}.ckpt"), "--data.root", str(photos)]) == 0
        assert f"val/accuracy: {accuracy:.4f}" in capsys.readouterr().out
    predict = ["predict", "--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--data.predict", str(photos / "val/red")]
    assert main(predict) == 0

    # The raw weights continue from best.ckpt, too, and not the average.
    assert fit(*flags, "--ckpt_path", str(RUN / "checkpoints/best.ckpt")) == 0
    resumed = read(run=RUN.with_name("version_1"))
    assert resumed["average"]["updates"] == last["average"]["updates"] == 9
    for tensors, expected in (
        (resumed["state_dict"], last["state_dict"]),
        (resumed["average"]["tensors"], last["average"]["tensors"]),
    ):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_average_of_a_step_that_is_resumed_without_it_is_ignored_and_a_new_one_starts(fit: Fit) -> None:
    assert fit(*PARTIAL, *SPOILED) == 0
    best = ["--ckpt_path", str(RUN / "checkpoints/best.ckpt"), "--trainer.max_epochs", "2"]
    assert fit(*PARTIAL, *SPOILED, *best, "--model.ema", "null") == 0
    without = read(run=RUN.with_name("version_1"))
    assert "average" not in without and without["transfer"]["weights"] == "raw"
    last = ["--ckpt_path", str(RUN.with_name("version_1") / "checkpoints/last.ckpt"), "--trainer.max_epochs", "3"]
    assert fit(*PARTIAL, *last) == 0
    assert read(run=RUN.with_name("version_2"))["average"]["updates"] == 3


def test_frozen_prefix_runs_once_for_both_weights(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda *args: (calls.append(1), encode(*args))[1])
    flags = [*PARTIAL, "--features.cache", "off", "--trainer.num_sanity_val_steps", "0"]
    assert fit(*flags) == 0
    with_average = len(calls)
    assert fit(*flags, "--model.ema", "null") == 0
    assert len(calls) == 2 * with_average


CLIPPED = ["--model.optimizer.lr", "1", "--trainer.gradient_clip_val", "1e-6"]
STOPPING = ["--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping"]
STOPPING += ["--trainer.callbacks.monitor", "val_ema/loss", "--trainer.callbacks.min_delta", "100"]
STOPPING += ["--trainer.callbacks.patience", "1"]
#: Flags of a fit of 4 epochs of 3 batches, and its number of steps.
TECHNIQUES = {
    "clipped": (CLIPPED, 12),
    "accumulated": ([*ADAMW, "--trainer.accumulate_grad_batches", "2"], 8),
    "stopped early": ([*ADAMW, *STOPPING], 6),
    "mixed": ([*ADAMW, "--features.cache", "off", "--data.mixup", "0.4", "--data.cutmix", "1.0"], 12),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_training_techniques_work_with_partly_frozen_networks_and_averages(name: str, fit: Fit, weights: Path) -> None:
    flags, steps = TECHNIQUES[name]
    assert fit(*PARTIAL, "--model.l2_sp", "0.1", "--trainer.max_epochs", "4", *flags) == 0
    checkpoint = read()
    assert checkpoint["average"]["updates"] == checkpoint["global_step"] == steps
    trained, average = checkpoint["state_dict"], checkpoint["average"]["tensors"]
    assert trained.keys() == average.keys() and {key.split(".")[2] for key in trained if "stages" in key} == {"layer4"}
    pretrained = load_backbone(BACKBONE, str(weights), 32).stages["layer4"].state_dict()
    change = 0.0
    for key, tensor in pretrained.items():
        value = trained[f"backbone.stages.layer4.{key}"]
        if "running_" in key or "num_batches" in key:
            assert torch.equal(value, tensor), "BatchNorm is frozen"
            assert torch.equal(average[f"backbone.stages.layer4.{key}"], tensor)
        else:
            change += float((value - tensor).square().sum())
    assert 0 < change < (1e-8 if name == "clipped" else torch.inf)
    assert values("train/l2_sp")[-1] == pytest.approx(0.05 * change, rel=1e-4)


def test_strong_l2_sp_keeps_the_weights_near_the_pretrained_ones(fit: Fit) -> None:
    flags = [*PARTIAL, "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "4"]
    for strength in ("1e-9", "10"):
        assert fit(*flags, "--model.l2_sp", strength) == 0
    weak, strong = (values("train/l2_sp", RUN.with_name(f"version_{number}"))[-1] for number in range(2))
    assert 0 < strong / 10 < 0.5 * weak / 1e-9, "squared distances"


def test_head_that_is_not_trained_has_no_average(fit: Fit, refused: Callable[[int], str]) -> None:
    flags = ["--model.head", "PrototypeHead", "--model.head_init", "auto", "--model.ema", "0.9"]
    assert "model.ema has no effect on PrototypeHead" in refused(fit(*STORED, *flags))


def test_damaged_average_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert fit(*PARTIAL, *SPOILED) == 0
    path, resume = RUN / "checkpoints/best.ckpt", [*PARTIAL, "--trainer.max_epochs", "2", "--ckpt_path", "damaged.ckpt"]
    damages: list[Callable[[dict[str, Any]], Any]] = [
        lambda checkpoint: checkpoint.pop("average"),
        lambda checkpoint: checkpoint["average"].update(updates=-1),
        lambda checkpoint: checkpoint["average"]["tensors"].popitem(),
        lambda checkpoint: checkpoint["state_dict"].popitem(),
        lambda checkpoint: checkpoint["average"]["tensors"].update({"head.weight": "text"}),
    ]
    for damage in damages:
        checkpoint = copy.deepcopy(torch.load(path, weights_only=True))
        damage(checkpoint)
        torch.save(checkpoint, "damaged.ckpt")
        assert "damaged" in refused(fit(*resume))


class Scales(pl.Callback):
    """Records whether the gradient scaler has skipped each step."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]


def test_average_skips_the_steps_that_the_gradient_scaler_skips(weights: Path, photos: Path, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
    model = ImageClassifier(BACKBONE, str(weights), "layer4", 32, head_init="random", ema=0.9)
    scales = Scales()
    trainer = Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[scales],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    with pytest.warns(UserWarning):  # Lightning warns about modules in eval mode and about num_workers
        trainer.fit(model, datamodule=ImageDataModule(str(photos), num_workers=0, batch_size=8))
    skipped = sum(after < before for before, after in zip([2.0**126, *scales.scales], scales.scales, strict=False))
    assert 0 < skipped < trainer.global_step == 6
    assert model.average is not None and model.average.updates == 6 - skipped


def test_batch_norm_trains_in_stages_that_join_later(
    fit: Fit, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ["--model.schedule", "{0: head, 1: layer4}", "--trainer.max_epochs", "2"]
    assert fit(*STORED, *schedule, "--model.batch_norm", "train") == 0
    assert "model.batch_norm has no effect" not in " ".join(capsys.readouterr().out.split())
    pretrained = load_backbone(BACKBONE, str(weights), 32).stages.state_dict()
    trained = {name.removeprefix("backbone.stages."): value for name, value in read()["state_dict"].items()}
    names = [name for name in trained if name.endswith("running_mean")]
    assert names and not any(torch.equal(trained[name], pretrained[name]) for name in names)


def test_random_weights_and_networks_without_batch_norm_are_reported(
    fit: Fit, here: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        assert fit("--model.weights", "null", "--model.trainable", "layer4") == 0
    assert "BatchNorm: the running statistics of random weights mean nothing" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="random weights"):
        assert fit("--model.weights", "null", "--model.trainable", "layer4", "--model.adapter", "bias") == 0
    assert "keeps them; use pretrained weights" in " ".join(capsys.readouterr().out.split())
