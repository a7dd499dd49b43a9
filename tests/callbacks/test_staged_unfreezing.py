"""Staged unfreezing: cuts, checkpoints, rows, learning rates, and what is refused."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project import load
from project.callbacks.staged_unfreezing import StagedUnfreezing
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.cli.main import main
from project.models.backbone import load_backbone
from tests.conftest import BACKBONE, SOLVED, STORED, row_counts, scalars

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
    assert "Schedule: head, layer4 from epoch 1, layer3 from epoch 2" in out
    assert "Schedule: layer4 now trained, after 1 epochs, with a warm-up of 1 steps" in out
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
        trained = [number for group in states["param_groups"] for number in group["params"] if number in states["state"]]
        assert len(trained) == len([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert main(["predict", "--ckpt_path", "2.ckpt", "--data.predict", str(photos / "test")]) == 0
    with Path("predictions.csv").open() as file:
        predicted = {row["path"]: float(row["probability"]) for row in csv.DictReader(file)}
    images = sorted(predicted)
    probabilities = load("2.ckpt").predict_proba(images).max(1)
    assert probabilities == pytest.approx([predicted[image] for image in images], abs=1e-6)
