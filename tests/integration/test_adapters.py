"""Fits with an adapter: what is saved, how it loads, starts other fits, and is reported."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from project import ImageClassifier, load
from project.cli.main import main
from project.features.provider import RowProvider
from project.inference import demo
from project.inference.gallery import Gallery, data_of
from project.models.backbone import merge_adapters
from project.models.loading import load_backbone
from project.reporting.run_description import trained_parameters
from tests.checkpoints.test_warm_start import NO_STEP, add_class, last, read
from tests.conftest import BACKBONE, COLOURS, SOLVED, STORED, row_counts, scalars

Fit = Callable[..., int]
ADAPTERS = ("bias", "norm", "lora")
ADAM = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.accelerator", "cpu"]


def adapter(name: str, trainable: str = "all") -> list[str]:
    return ["--model.adapter", name, "--model.trainable", trainable, *ADAM]


@pytest.mark.parametrize("trainable", ["all", "layer4"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_checkpoint_holds_adapter_and_head_and_restores_the_model(
    name: str, trainable: str, fit: Fit, photos: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*adapter(name, trainable), "--trainer.max_epochs", "2") == 0
    out = capsys.readouterr().out
    checkpoint, classifier = read(last(0)), load(last(0))
    model, backbone = classifier.model, load_backbone(BACKBONE, str(weights), 32)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert checkpoint["state_dict"].keys() == trained
    assert checkpoint["transfer"]["adapter"] == {"lora": "lora of rank 8"}.get(name, name)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    stages = dict.fromkeys(group["name"].removesuffix(" (no decay)") for group in groups)
    assert [*stages] == [*model.cut.trainable, "head"]
    for key, tensor in backbone.stages.state_dict().items():  # the base is the pretrained network, bit for bit
        path, _, parameter = key.rpartition(".")
        state = model.backbone.stages.state_dict()
        now = state.get(f"{path}.parametrizations.{parameter}.original", state.get(key))
        assert f"backbone.stages.{key}" in trained or torch.equal(now, tensor), key
    assert "all tensors of timm/test_resnet except the adapter" in " ".join(out.split())
    sha256 = checkpoint["transfer"]["frozen"]["sha256"]
    assert "".join(character for character in out if character not in "│\n ").count(sha256) == 2

    paths = [photos / "val" / colour / f"{number}.png" for colour in COLOURS for number in range(4)]
    probabilities = classifier.predict_proba(paths)
    loss = -np.log(probabilities[np.arange(12), np.arange(12) // 4]).mean()
    logged = [event.value for event in scalars(last(0).parents[1]).Scalars("val/loss")]
    assert loss == pytest.approx(logged[-1], abs=1e-5) and logged[0] != logged[1]
    model.backbone = merge_adapters(model.backbone)
    np.testing.assert_allclose(classifier.predict_proba(paths), probabilities, atol=1e-4)

    data = ["--data.root", str(photos), "--data.num_workers", "0", "--ckpt_path", str(last(0))]
    assert main(["validate", *data, "--trainer.accelerator", "cpu"]) == 0
    assert f"{logged[-1]:.4f}" in capsys.readouterr().out
    predict = ["--data.predict", str(photos / "val"), "--data.num_workers", "0", "--ckpt_path", str(last(0))]
    assert main(["predict", *predict, "--trainer.accelerator", "cpu"]) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("flags", [adapter("lora", "layer4"), adapter("norm", "all"), ["--model.trainable", "all"]])
def test_demo_shows_the_heat_map_and_the_nearest_images(flags: list[str], fit: Fit, photos: Path) -> None:
    """A low-rank update of a 3 x 3 kernel is no feature map. Without frozen stages, no rows are stored."""
    assert fit(*flags) == 0
    classifier = load(last(0))
    gallery = Gallery(classifier, data_of(last(0)), provider=RowProvider("torch", "auto", 1.0, Path("store")))
    file = photos / "train/red/0.png"
    assert classifier.heat_map([file]).shape == (1, 32, 32)
    assert demo.classify_file(classifier, gallery, str(file)).html.count("<img") == 2 + demo.NEAREST
    np.testing.assert_allclose(gallery.features[-8:], classifier.features([*sorted(file.parent.iterdir())]), atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_in_blocks_of_a_transformer(
    name: str, fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stages are parts of one network, whose fingerprint covers all of them; drift compares it."""
    network = ["--model.backbone", "timm/test_vit", "--model.weights", "null", "--model.image_size", "160"]
    with pytest.warns(UserWarning, match="random weights"):
        code = fit(*adapter(name, "-2"), *network, "--model.ema", "0.9", "--model.interpolate", "auto")
        assert code == 0
        classifier = load(last(0))
    assert classifier.model.cut.trainable == ("blocks.4", "blocks.5")
    assert "Interpolation: alpha" in " ".join(capsys.readouterr().out.split())
    assert 0 < scalars(last(0).parents[1]).Scalars("drift/cka")[0].value <= 1
    assert classifier.predict_proba([photos / "val/red/0.png"]).shape == (1, 3)


def test_card_and_dashboard_name_the_adapter_and_its_parameters(fit: Fit) -> None:
    assert fit(*adapter("lora", "layer3"), "--model.lora_rank", "2", "--model.lora_targets", "[conv1]") == 0
    run = last(0).parents[1]
    count = trained_parameters(load(last(0)).model)
    text = (run / "model_card.md").read_text()
    assert "Adapter: lora of rank 2 in conv1" in text and f"Trained parameters: {count:,} of" in text
    assert f"Only an adapter (lora of rank 2 in conv1) and the head were trained, {count:,} parameters." in text
    assert "SHA-256 of the frozen tensors" in text
    assert scalars(run).Scalars("parameters/trainable")[0].value == count
    values = read(last(0))["hyper_parameters"]
    assert (values["adapter"], values["lora_rank"], values["lora_targets"]) == ("lora", 2, ["conv1"])


def test_stored_rows_of_a_cut_are_shared_by_all_adapters(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("none", *ADAPTERS):
        assert fit(*STORED, *adapter(name, "layer3")) == 0
    (first, *others) = row_counts(capsys.readouterr().out)
    assert first == (0, 36) and others == [(36, 0)] * 3


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_the_start_of_a_fit_with_more_classes(
    name: str, fit: Fit, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*adapter(name)) == 0
    add_class(album)
    capsys.readouterr()
    grown = ["--data.root", "album", "--name", "photos", "--ckpt_path", str(last(0))]
    assert fit(*grown, *adapter(name), *NO_STEP) == 0
    assert "Classes: 1 new (amber)" in capsys.readouterr().out
    before, after = read(last(0))["state_dict"], read(last(1))["state_dict"]
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key][1:] if key.startswith("head.") else after[key], tensor), key


def test_head_is_the_start_of_a_fit_with_an_adapter_which_is_the_start_of_one_in_more_stages(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED, *SOLVED) == 0
    assert fit(*adapter("lora", "layer4"), *NO_STEP, "--ckpt_path", str(last(0))) == 0
    assert fit(*adapter("lora", "layer3"), *NO_STEP, "--ckpt_path", str(last(1))) == 0
    out = capsys.readouterr().out
    assert "Stages: layer4 now trained" in out and "Stages: layer3 now trained" in out
    states = [read(last(version))["state_dict"] for version in range(3)]
    for fewer, more in itertools.pairwise(states):
        assert fewer.keys() < more.keys()
        assert all(torch.equal(more[key], tensor) for key, tensor in fewer.items())


def test_another_adapter_than_that_of_the_checkpoint_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert fit(*adapter("lora", "layer4"), "--model.lora_rank", "2") == 0
    for name, rank in (("norm", "null"), ("none", "null"), ("lora", "4")):
        other = ["--model.adapter", name, "--model.lora_rank", rank]
        message = refused(fit("--ckpt_path", str(last(0)), "--trainer.max_epochs", "2", *other))
        assert "model.adapter differs: it is lora of rank 2 in the checkpoint" in message
        assert "Omit --model.adapter" in message


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model.adapter", "lora"], "model.adapter lora has no effect with model.trainable head"),
        ([*adapter("lora"), "--model.lora_targets", "[conf1]"], "is called 'conf1'"),
        ([*adapter("lora"), "--trainer.precision", "bf16-true"], "would round the frozen weights"),
        ([*adapter("norm"), "--features.cache", "on"], "model.trainable is all, so no stage is frozen"),
        (
            [*adapter("lora"), "--model.lora_targets", "[layer4]", "--model.features", "stages"],
            "model.features stages reads stages before layer4, the first one of which model.adapter lora trains",
        ),
    ],
)
def test_mistakes_are_refused(flags: list[str], text: str, fit: Fit, refused: Callable[[int], str]) -> None:
    assert text in refused(fit(*flags))


def test_change_of_the_base_during_training_is_an_error(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def modify(self: Any) -> None:
        self.backbone.stages["layer4"][0][0].bn1.running_mean += 1e-3

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", modify)
    assert fit(*adapter("lora", "layer4")) == 2
    assert f"frozen tensors of {BACKBONE} changed during training" in capsys.readouterr().err
