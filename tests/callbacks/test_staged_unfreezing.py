"""Staged unfreezing: cuts, checkpoints, rows, learning rates, and what is refused."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from project import load
from project.callbacks.feature_cache import FeatureCache
from project.callbacks.staged_unfreezing import StagedUnfreezing
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.cli.main import main
from project.data.datamodule import ImageDataModule
from project.models.loading import load_backbone
from project.trainer import Trainer
from tests.conftest import BACKBONE, COLOURS, SOLVED, STORED, row_counts, scalars

Fit = Callable[..., int]
ADAM = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--data.batch_size", "8"]  # 3 steps an epoch
SCHEDULE = ["--model.schedule", "{0: head, 1: layer4, 2: layer3}", "--trainer.max_epochs", "4"]
PLATEAU = ["--model.schedule", "[head, layer4, layer3]", "--model.schedule_patience", "1"]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def checkpoints(version: int = 0) -> Path:
    return Path(f"runs/photos/version_{version}/checkpoints")


def stages(path: Path) -> list[str]:
    """The stages whose tensors a checkpoint has."""
    names = [name.split(".")[2] for name in read_checkpoint(path)["state_dict"] if name.startswith("backbone.stages.")]
    return sorted(set(names))


@pytest.fixture
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Saves ``N.ckpt`` after N epochs; returns the cuts of the epochs, by their first trainable stage."""
    cuts: list[str] = []
    end = StagedUnfreezing.on_train_epoch_end

    def save(self: StagedUnfreezing, trainer: Any, module: ImageClassifier) -> None:
        cuts.append(module.cut.trainable[0] if module.cut.trainable else "head")
        trainer.save_checkpoint(f"{len(cuts)}.ckpt")
        end(self, trainer, module)

    monkeypatch.setattr(StagedUnfreezing, "on_train_epoch_end", save)
    return cuts


def test_a_checkpoint_has_the_stages_trained_so_far_and_loads_with_equal_probabilities(
    fit: Fit, every_epoch: list[str], photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*ADAM, *SCHEDULE, *STORED, *SOLVED) == 0
    out = capsys.readouterr().out
    assert every_epoch == ["head", "layer4", "layer3", "layer3"]
    assert "Schedule: head, layer4 after 1 epoch, layer3 after 2 epochs" in out
    assert "Schedule: layer4 now trained, after 1 epoch, with a warm-up of 1 step" in out
    assert [computed for _, computed in row_counts(out)] == [36, 36, 36]  # 24 training and 12 validation images
    assert out.count("MB of rows at the new cut, after ") == 2
    assert [stages(Path(f"{epoch}.ckpt")) for epoch in (1, 2, 3)] == [[], ["layer4"], ["layer3", "layer4"]]
    pretrained = load_backbone(BACKBONE, str(weights), 32)
    images = sorted(map(str, photos.glob("test/*/*.png")))
    for epoch in range(1, 5):
        model = ImageClassifier.load_from_checkpoint(f"{epoch}.ckpt")
        saved = read_checkpoint(f"{epoch}.ckpt")
        assert saved["transfer"]["frozen"] == {"stages": list(model.cut.frozen), "sha256": model.frozen_sha256}
        assert pretrained.fingerprint(model.cut) == model.frozen_sha256
        states = saved["optimizer_states"][0]
        trained = [
            number for group in states["param_groups"] for number in group["params"] if number in states["state"]
        ]
        assert len(trained) == len([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert main(["predict", "--ckpt_path", "2.ckpt", "--data.predict", str(photos / "test")]) == 0
    with Path("predictions.csv").open() as file:
        predicted = {row["path"]: float(row["probability"]) for row in csv.DictReader(file)}
    images = sorted(predicted)
    probabilities = load("2.ckpt").predict_proba(images).max(1)
    assert probabilities == pytest.approx([predicted[image] for image in images], abs=1e-6)


def test_learning_rates_ramp_up_and_schedulers_stay_exact(fit: Fit, every_epoch: list[str]) -> None:
    cosine = ["--model.scheduler", "CosineAnnealingLR", "--model.scheduler_interval", "step"]
    flags = [*cosine, "--model.lr_decay", "0.5", "--model.schedule_warmup", "1", "--trainer.log_every_n_steps", "1"]
    assert fit(*ADAM, *SCHEDULE, *STORED, *flags) == 0
    plain = [0.01 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(13)]
    ramps = {
        "head": [1.0] * 12,
        "layer4": [0.0] * 3 + [0.125, 0.25, 0.375] + [0.5] * 6,
        "layer3": [0.0] * 6 + [0.0625, 0.125, 0.1875] + [0.25] * 3,
    }
    events = scalars(checkpoints().parent)
    for stage, factors in ramps.items():
        logged = {event.step: event.value for event in events.Scalars(f"lr-AdamW/{stage}")}
        expected = [rate * factor for rate, factor in zip(plain, factors, strict=False)]
        assert [logged[step] for step in range(12)] == pytest.approx(expected, abs=1e-9), stage
    for epoch in (1, 2, 3, 4):  # the optimizer's own rates are those of the scheduler
        saved = read_checkpoint(f"{epoch}.ckpt")
        rates = {group["name"]: group["lr"] for group in saved["optimizer_states"][0]["param_groups"]}
        for depth, stage in enumerate(ramps):
            for name in (stage, f"{stage} (no decay)"):
                assert rates[name] == pytest.approx(plain[3 * epoch] * 0.5**depth, abs=1e-12)
    assert [event.value for event in events.Scalars("stage/trainable_stages")] == [0, 1, 2, 2]


def test_a_stage_begins_when_the_validation_loss_stops_improving(
    fit: Fit, every_epoch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0, 1.5, 1.5, 1.5])  # the second one is not improved on twice, and the fifth
    end = StagedUnfreezing.on_validation_end

    def validated(self: StagedUnfreezing, trainer: Any, module: Any) -> None:
        if trainer.sanity_checking:
            return
        seen = {"state": trainer.state, "sanity_checking": False, "global_step": trainer.global_step}
        end(self, SimpleNamespace(**seen, callback_metrics={"val/loss": torch.tensor(next(losses))}), module)

    monkeypatch.setattr(StagedUnfreezing, "on_validation_end", validated)
    flags = ["--model.schedule", "[head, -1, -2]", "--trainer.max_epochs", "8"]
    assert fit(*ADAM, *STORED, *flags) == 0
    assert every_epoch == ["head"] * 4 + ["layer4"] * 3 + ["layer3"]


def test_live_computation_takes_over_where_the_rows_exceed_the_budget(
    fit: Fit, refused: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--features.budget", "0.0001", "--features.folder", "store"]
    assert fit(*ADAM, *SCHEDULE, *small) == 0
    out = capsys.readouterr().out
    assert len(row_counts(out)) == 1
    assert out.count("Features: computed in every epoch, because 36 rows of ") == 2
    assert out.count("; the frozen stages take about ") == 2
    for flags, reason in (
        ([*SCHEDULE, *small, "--features.cache", "on"], "the rows of model.schedule layer4 take about 0.000111 GB"),
        (["--model.schedule", "{0: head, 1: all}", "--features.cache", "on"], "model.schedule stem leaves no stage"),
    ):
        message = refused(fit(*ADAM, "--trainer.max_epochs", "4", *flags))
        assert "Feature caching is not possible" in message and reason in message


def test_changed_frozen_weights_are_found_when_the_cut_moves(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = StagedUnfreezing.on_train_epoch_end

    def modify(self: StagedUnfreezing, trainer: Any, module: ImageClassifier) -> None:
        next(module.backbone.stages["layer4"].parameters()).data.add_(1)
        end(self, trainer, module)

    monkeypatch.setattr(StagedUnfreezing, "on_train_epoch_end", modify)
    message = refused(fit(*ADAM, *SCHEDULE, *STORED))
    assert "The frozen stages of timm/test_resnet changed before layer4 is trained" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.schedule", "{0: head, 1: layer9}"], "model.schedule: timm/test_resnet has no stage 'layer9'"),
        (["--model.schedule", "{0: head, 9: layer4}"], "layer4 would begin after 9 epochs, but the fit has 4"),
        (["--model.schedule", "{0: layer3, 1: layer4}"], "trained stages cannot be frozen again"),
        (["--model.schedule", "{0: head, 9: layer4}", "--trainer.max_steps", "5"], "layer4 would begin after 9 epochs"),
        ([*SCHEDULE, "--trainer.max_epochs", "-1", "--trainer.max_steps", "1"], "Increase --trainer.max_steps"),
        (["--model.schedule", "{0: head, x: layer4}"], "model.schedule: x is not a number of epochs"),
        (["--model.schedule", "{0: head, 1.5: layer4}"], "model.schedule: 1.5 is not a number of epochs"),
        ([*SCHEDULE, "--model.trainable", "layer4"], "model.schedule and model.trainable layer4 exclude each other"),
        ([*SCHEDULE, "--model.schedule_patience", "3"], "model.schedule_patience has no effect"),
        (["--model.schedule_patience", "3"], "model.schedule_patience has no effect without model.schedule"),
        (["--model.schedule_warmup", "2"], "model.schedule_warmup has no effect without model.schedule"),
        ([*SCHEDULE, "--model.schedule_warmup", "-1"], "model.schedule_warmup must be at least 0 epochs, not -1"),
        ([*PLATEAU, "--trainer.limit_val_batches", "0"], "a list of stages needs validations"),
        ([*SCHEDULE, "--model.optimizer", "LBFGS"], "LBFGS keeps one history for all parameters"),
        (
            ["--model.schedule", "[head, layer4, all]", "--model.features", "stages"],
            "model.features stages needs all stages on one side",
        ),
        ([*SCHEDULE, "--model.head", "project.models.heads.PrototypeHead"], "model.schedule changes the features"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_schedules_that_cannot_take_effect_are_refused(
    flags: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit(*STORED, *SOLVED, "--trainer.max_epochs", "4", *flags))


def test_a_changed_schedule_takes_effect_later_or_is_refused(
    fit: Fit, every_epoch: list[str], refused: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*ADAM, *SCHEDULE, *STORED) == 0
    every_epoch.clear()
    Path("2.ckpt").rename("layer4.ckpt")
    resume = [*ADAM, *STORED, "--ckpt_path", "layer4.ckpt", "--trainer.max_epochs", "5"]
    for schedule, message in (
        ("{0: head, 4: layer4, 5: layer3}", "layer4 would begin after epoch 2, but the checkpoint trains it already"),
        ("{0: head, 1: layer4, 3: layer2}", "ends with layer2, and that of the checkpoint with layer3"),
        ("{0: head, 1: layer3}", "has no entry with the stages that the checkpoint trains"),
    ):
        assert message in refused(fit(*resume, "--trainer.max_epochs", "9", "--model.schedule", schedule))
    assert fit(*resume, "--model.schedule", "{0: head, 1: layer4, 4: layer3}") == 0
    assert every_epoch == ["layer4", "layer4", "layer3"]
    assert "is ignored" not in capsys.readouterr().out
    every_epoch.clear()
    assert fit(*resume) == 0  # the schedule of the checkpoint
    assert every_epoch == ["layer3", "layer3", "layer3"]


def test_a_probe_is_a_start_and_a_scheduled_fit_is_a_start_for_a_fixed_cut(
    fit: Fit, every_epoch: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*ADAM, *STORED) == 0
    assert fit(*ADAM, *SCHEDULE, *STORED, "--ckpt_path", "1.ckpt") == 0
    assert "Checkpoint: a new fit starts" in capsys.readouterr().out
    assert every_epoch == ["head", "head", "layer4", "layer3", "layer3"]
    fixed = ["--model.schedule", "null", "--model.trainable", "layer4", "--ckpt_path", "3.ckpt"]
    assert fit(*ADAM, *STORED, *fixed) == 0
    assert "Checkpoint: a new fit starts" in capsys.readouterr().out


def test_a_damaged_state_is_refused(fit: Fit, every_epoch: list[str], refused: Callable[[int], str]) -> None:
    assert fit(*ADAM, *SCHEDULE, *STORED) == 0
    for change in ({"waited": "2"}, {"warm_ups": {"layer4": [1]}}, {"best": None}):
        checkpoint = torch.load("2.ckpt", weights_only=True)
        checkpoint["unfreezing"] |= change
        torch.save(checkpoint, "damaged.ckpt")
        message = refused(fit(*ADAM, *STORED, "--ckpt_path", "damaged.ckpt", "--trainer.max_epochs", "5"))
        assert "its state of model.schedule is missing or invalid" in message


@pytest.mark.filterwarnings("ignore:.*")
def test_a_fit_on_own_loaders_follows_the_schedule(
    photos: Path, weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = {0: "head", 1: "layer4"}
    model = ImageClassifier(BACKBONE, str(weights), image_size=32, classes=list(COLOURS), schedule=schedule)
    data = ImageDataModule(str(photos), num_workers=0)
    data.preprocessing = model.backbone.preprocessing
    loader = data.training_images(slice(24))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=2, callbacks=[FeatureCache()], enable_checkpointing=False, **options).fit(model, loader, loader)
    assert model.cut.trainable == ("layer4",)
    assert "because the data does not come from an ImageDataModule\n" in capsys.readouterr().out
