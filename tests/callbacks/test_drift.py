"""Drift is the similarity of the current features to those of the pretrained network."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project import load
from project.callbacks import drift
from project.evaluation.cka import linear_cka
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, SMALL, STORED, scalars
from tests.forked import start

Fit = Callable[..., int]
VERSION = Path("runs/photos/version_0")
LAYER4 = [*STORED, "--model.trainable", "layer4", "--model.optimizer", "torch.optim.SGD", "--trainer.max_epochs", "3"]


def similarities(version: Path = VERSION) -> list[float]:
    return [event.value for event in scalars(version).Scalars("drift/cka")]


def test_unchanged_features_have_a_similarity_of_1(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--model.optimizer.lr", "0", "--model.head_init", "auto"]
    assert fit(*LAYER4, *rates, "--trainer.max_epochs", "0") == 0
    assert similarities() == [pytest.approx(1, abs=1e-6)]
    assert "features: CKA 1.000 with the pretrained ones on 12 validation images" in capsys.readouterr().out
    assert "- Drift of the features: CKA 1.000 with" in (VERSION / "model_card.md").read_text()


def test_a_large_learning_rate_changes_the_features_more(fit: Fit) -> None:
    for rate in ("0.001", "0.3"):
        assert fit(*LAYER4, "--model.optimizer.lr", rate) == 0
    small, large = (similarities(VERSION.with_name(f"version_{number}")) for number in (0, 1))
    assert len(small) == 3 and small[0] > 0.99
    assert min(large) < 0.95 and large[-1] < small[-1] <= 1


@pytest.mark.parametrize("flags", [[], ["--features.cache", "off"]], ids=["stored", "live"])
def test_it_compares_the_features_of_the_checkpoint_with_the_pretrained_ones(
    flags: list[str], fit: Fit, photos: Path, weights: Path
) -> None:
    live = ["--features.engine", "auto"] if flags else []
    assert fit(*LAYER4, "--model.optimizer.lr", "0.1", *live, *flags, "--trainer.max_epochs", "1") == 0
    images = sorted((photos / "val").glob("*/*"))
    features = torch.as_tensor(load(VERSION / "checkpoints/best.ckpt").features(images))
    pretrained = load(VERSION / "checkpoints/best.ckpt")
    backbone = load_backbone(BACKBONE, str(weights), 32)
    pretrained.model.backbone.stages.load_state_dict(backbone.stages.state_dict())
    expected = linear_cka(features, torch.as_tensor(pretrained.features(images)))
    assert similarities() == [pytest.approx(expected, abs=1e-4)]
    assert expected < 0.999


def test_a_schedule_compares_with_the_pretrained_features_after_each_move_of_the_cut(
    fit: Fit, photos: Path, weights: Path
) -> None:
    flags = ["--model.schedule", "{0: head, 1: layer4, 2: layer3}", "--trainer.max_epochs", "3"]
    rate = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.schedule_warmup", "0"]
    assert fit(*STORED, *flags, *rate) == 0
    measured = similarities()
    assert measured[0] == pytest.approx(1, abs=1e-6)  # only the head is trained
    assert max(measured[1:]) < 0.999
    trained = load(VERSION / "checkpoints/last.ckpt")
    images = sorted((photos / "val").glob("*/*"))
    features = torch.as_tensor(trained.features(images))
    backbone = load_backbone(BACKBONE, str(weights), 32)
    trained.model.backbone.stages.load_state_dict(backbone.stages.state_dict())
    assert measured[2] == pytest.approx(linear_cka(features, torch.as_tensor(trained.features(images))), abs=1e-4)


def test_nothing_is_measured_if_only_the_head_is_trained(trained: Path) -> None:
    assert "drift/cka" not in scalars(trained).Tags()["scalars"]


def test_the_sample_is_the_same_in_a_resumed_fit(
    tmp_path: Path, photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared to the bit, on 5 of 12 images, and after a start from a checkpoint that has trained the stage."""
    flags = ["fit", *SMALL, *LAYER4, "--model.weights", str(weights), "--data.root", str(photos)]
    flags += ["--model.optimizer.lr", "0.05", "--data.batch_size", "8"]
    whole = start(tmp_path, [*flags, "--name", "whole"], prepare=_small_sample)
    assert whole.wait() == 0, whole.output
    killed = start(tmp_path, flags, {"step": 4}, prepare=_small_sample)
    assert killed.wait() == -signal.SIGKILL
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"], prepare=_small_sample)
    assert resumed.wait() == 0, resumed.output
    expected = similarities(tmp_path / "runs/whole/version_0")
    after = similarities(tmp_path / "runs/photos/version_1")
    assert after == expected[-len(after) :] and len(after) == 2
    shown = [re.findall(r"features: CKA .*", run.output) for run in (whole, resumed)]
    assert shown[0] == shown[1] and "on 5 validation images" in shown[0][0]


def _small_sample() -> None:
    drift.MAX_IMAGES = 5
